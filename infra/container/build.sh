#!/usr/bin/env bash
# Builds the image and tags it as the files in infra/ expect: <name>:<version>-ray<version of Ray>-<cpu or gpu>.
#
#   infra/container/build.sh cpu|gpu [options of docker build]
#
# IMAGE names it (default: xmem-pipeline); with a registry in front it can be pushed. DOCKER: another builder
# (podman). The cpu image needs torch's CPU build: --build-arg TORCH_INDEX_URL=..., the address that the PyTorch
# project gives for Linux, pip, CPU.
set -euo pipefail
kind="${1:-}"
case "$kind" in
    cpu | gpu) shift ;;
    *) echo "usage: $0 cpu|gpu [options of docker build]" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/../.."
version="$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml | head -n 1)"
ray="$(sed -n 's/^ray==//p' constraints.txt)"
: "${version:?no version in pyproject.toml}" "${ray:?no ray in constraints.txt}"
tag="${IMAGE:-xmem-pipeline}:$version-ray$ray-$kind"
DOCKER_BUILDKIT=1 "${DOCKER:-docker}" build --file infra/container/Dockerfile --target "$kind" --tag "$tag" "$@" .
echo "$tag"
