# syntax=docker/dockerfile:1
#
# The image of a RunPod worker: one binary, its kernels as machine code, the C library it links, root certificates. No Python,
# no compiler.
#
#   docker buildx build --platform linux/amd64 \
#     --build-arg BUILD_IMAGE=docker.io/library/rust:1.95.0-bookworm@sha256:… \
#     --build-arg RUNTIME_IMAGE=docker.io/library/debian:bookworm-slim@sha256:… \
#     --build-arg GIT_REVISION="$(git rev-parse HEAD)" -t REGISTRY/brightrun:VERSION .
#
# A release passes both images with their digests, as above; the tags below are for trying things out. Both must have the same C
# library. The GPU's driver library is put into the container by the host; a base with CUDA's runtime libraries can be given as
# RUNTIME_IMAGE without any other change.

ARG BUILD_IMAGE=docker.io/library/rust:1.95.0-bookworm
ARG RUNTIME_IMAGE=docker.io/library/debian:bookworm-slim
ARG PYTHON_IMAGE=docker.io/library/python:3.13-slim-bookworm

# The CUDA compiler, which is a library and needs no GPU. Kernels by 12.9 run on drivers from 525 on, those by 13.0
# (NVRTC=nvidia-cuda-nvrtc==13.0.88, of which docs/reference/kernels.md tells) from 580 on only, which not every host has.
FROM ${PYTHON_IMAGE} AS compiler
ARG NVRTC=nvidia-cuda-nvrtc-cu12==12.9.86
# The argument names the version.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --no-deps --target /wheel "${NVRTC}" \
    && mkdir /nvrtc \
    && find /wheel -name 'libnvrtc*.so*' ! -name '*.alt.*' -exec mv '{}' /nvrtc/ ';'

FROM ${BUILD_IMAGE} AS build
ARG GIT_REVISION=unknown
WORKDIR /build
COPY . .
# The binary carries its revision: adapters and manifests name it.
ENV BRIGHTRUN_GIT_REVISION=${GIT_REVISION}
# Registry and target folders are caches, so that an edit does not build the dependencies again.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/build/target \
    cargo build --profile dist --locked -p brightrun-worker --bin brightrun \
    && install -D -m 0755 target/dist/brightrun /out/brightrun
# Every kernel as machine code, so that a worker compiles nothing when it starts.
ARG KERNEL_TARGETS=sm_80,sm_86,sm_89,sm_90a,sm_100,sm_120
RUN --mount=type=bind,from=compiler,source=/nvrtc,target=/nvrtc \
    BRIGHTRUN_NVRTC=/nvrtc /out/brightrun kernels build --arch "${KERNEL_TARGETS}" --out /out/kernels

FROM ${RUNTIME_IMAGE} AS runtime
ARG GIT_REVISION=unknown
LABEL org.opencontainers.image.title="brightrun-trainer" \
      org.opencontainers.image.description="Trains LoRA adapters from rows of a Postgres table" \
      org.opencontainers.image.revision="${GIT_REVISION}"
# Debian removes old versions from its archive, so a pinned one would stop building; the base image's digest pins the rest.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 brightrun \
    && useradd --uid 10001 --gid brightrun --create-home --shell /usr/sbin/nologin brightrun \
    && printf '%s\n' "${GIT_REVISION}" > /etc/brightrun-revision
COPY --from=build /out/brightrun /usr/local/bin/brightrun
COPY --from=build /out/kernels /usr/local/lib/brightrun/kernels
ENV BRIGHTRUN_KERNELS=/usr/local/lib/brightrun/kernels
# Read by NVIDIA's container runtime: which GPUs and which parts of the driver the container sees.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /home/brightrun
# No model is read and no driver called: a look at the mount table and one empty file.
HEALTHCHECK --interval=5m --timeout=30s --start-period=2m --retries=3 CMD ["brightrun", "doctor", "--live", "--json"]
# The exec form: the worker is process 1 and gets SIGTERM itself.
ENTRYPOINT ["/usr/local/bin/brightrun"]
CMD ["worker"]
