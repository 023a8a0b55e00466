"""The view `tracks` of an archive that has compacted files: DuckDB reads these, pyarrow all other rows.

Without compacted files, or on a store, the view is the dataset of `pipeline.analytics.scan.dataset` alone,
which reads compacted files too. It takes three times as long for that, but falls back to the chunk files
where a compacted file is gone or holds other rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import duckdb

from pipeline.analytics.scan.copy_reader import CopyFiles
from pipeline.analytics.scan.dataset import ChunkDataset
from pipeline.analytics.scan.listing import Listing
from pipeline.base.errors import StoreError
from pipeline.storage.local_files import LocalFiles
from pipeline.tracks.copies import FOLDER, Copy

TRIES = 3
"""How often a statement is run whose compacted files are replaced while it is read."""
_OWN = "_tracks_beside_copies"


class CompactedTracks:
    """Makes the view `tracks`, anew for each statement that needs other compacted files.

    Args:
        connection: DuckDB, whose configuration is not locked yet.
        listing: the output folder.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, listing: Listing) -> None:
        self._connection, self._listing = connection, listing
        self._files: CopyFiles | None = None
        self._own: ChunkDataset | None = None
        self._now: list[str] = []
        self._kept = False
        self._stale_before = 0
        self.settings: Sequence[str] = ()
        """Settings of DuckDB to make before its access to files is switched off."""
        if isinstance(listing.files, LocalFiles) and listing.files.folders(FOLDER):
            try:
                files = CopyFiles(listing)
                connection.register_filesystem(files)
                connection.execute(f"SET allowed_directories = ['{files.protocol}://']")
                connection.execute("SET enable_external_file_cache = false")
            except (duckdb.Error, AttributeError):  # another version of DuckDB
                return
            self._files = files

    @property
    def may_hold(self) -> bool:
        """Whether DuckDB may read compacted files."""
        return self._files is not None

    @property
    def own_name(self) -> str:
        """The name under which the dataset of the view is registered."""
        return "tracks" if self._files is None else _OWN

    @property
    def failure(self) -> StoreError | None:
        """Why a compacted file could not be read."""
        return None if self._files is None else self._files.failure

    def make_view(self, own: ChunkDataset) -> None:
        """Make the view, of the registered dataset `own`."""
        self._own = own
        if self._files is not None:
            self._make([])

    def choose(self, stream_ids: frozenset[str] | None, *, none: bool = False) -> None:
        """Let the view read the compacted files with rows of some streams (None: of all), or none.

        Raises:
            duckdb.Error: see `is_worth_a_retry`. StoreError: a file cannot be opened.
        """
        if self._files is None:
            return
        if self._kept:  # relations that were made before read the same view
            stream_ids = None
        self._files.failure, self._files.only = None, stream_ids
        self._stale_before = len(self._files.stale)
        copies = [] if none else self._listing.all_copies()
        wanted = [c for c in copies if stream_ids is None or not stream_ids.isdisjoint(c.chunks)]
        held = self._files.hold([copy for copy in wanted if copy.name not in self._files.stale])
        if [copy.name for copy in held] != self._now:
            self._make(held)

    def keep(self) -> None:
        """Let the view read all compacted files from now on, for statements that are run later.

        Raises:
            duckdb.Error, StoreError: as for `choose`.
        """
        self._kept = True
        for left in reversed(range(TRIES)):
            try:
                self.choose(None, none=not left)
                return
            except duckdb.Error as error:
                if not left or not self.is_worth_a_retry(error):
                    raise

    def is_worth_a_retry(self, error: duckdb.Error) -> bool:
        """Whether a statement may succeed if it is run again: files were replaced, or DuckDB cannot read one.

        On the last of `TRIES`, DuckDB reads none.
        """
        if self._files is None or self.failure is not None:  # that says what is wrong
            return False
        return len(self._files.stale) > self._stale_before or self._files.protocol in str(error)

    def close(self) -> None:
        """Close the compacted files."""
        if self._files is not None:
            self._files.close()

    def _make(self, copies: Sequence[Copy]) -> None:
        assert self._files is not None
        assert self._own is not None
        sql = f"CREATE OR REPLACE VIEW tracks AS SELECT * FROM {_OWN}"
        if copies:
            columns = ", ".join(self._own.schema.names)
            uris = ", ".join(f"'{self._files.uri(copy)}'" for copy in copies)
            sql = (
                f"CREATE OR REPLACE VIEW tracks AS SELECT {columns} FROM {_OWN} "
                f"UNION ALL SELECT {columns} FROM read_parquet([{uris}])"
            )
        self._connection.execute(sql)
        self._now = [copy.name for copy in copies]
        self._own.read_elsewhere = {copy.name: self._files.held(copy) for copy in copies}
