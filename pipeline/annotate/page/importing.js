// Files of masks, read in this browser and sent to the server as one edit.

const MOST_BYTES = 5.5e6;  // as base64 a third more, below what the server takes

// The body of an import of files.
export async function bodyOf(files, frame) {
  const size = [...files].reduce((sum, file) => sum + file.size, 0);
  if (size > MOST_BYTES) {
    throw new Error(`The files have ${(size / 1e6).toFixed(1)} MB; the page takes ${MOST_BYTES / 1e6} MB. \
Start with \`xmem annotate VIDEO --out OUT --import FOLDER\` instead.`);
  }
  return { frame, files: await Promise.all([...files].map(async (file) => ({ name: file.name, content: await base64(file) }))) };
}

function base64(file) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => failed(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}
