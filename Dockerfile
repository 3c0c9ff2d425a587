# syntax=docker/dockerfile:1
# The server as an image, for CPUs (the default target) and for NVIDIA GPUs:
#   docker build --target cpu  --tag slimserve:cpu .
#   docker build --target cuda --tag slimserve:cuda .
# deploy/README.md says how it is run and what of it was tried.

# --- Debian with the Python that packages are installed for.
FROM debian:bookworm-slim AS python
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

# --- The wheel of this repository, its native CPU kernels compiled. No compiler gets into the CPU image.
FROM python AS wheel
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
RUN python3 -m venv /opt/build && /opt/build/bin/pip install "setuptools>=77" wheel
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY engines engines
COPY server server
COPY compression compression
# The kernels are optional for users without a compiler. Here a wheel without them is a mistake.
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /opt/build/bin/python -m zipfile --list /wheels/slimserve-*.whl > /build/contents \
    && grep --quiet 'native/_kernels.*[.]so' /build/contents

# --- PyTorch first: it is the largest layer and changes least.
FROM python AS packages-cpu
# PyTorch's CPU builds are on an index of their own. Give your mirror of it where that one cannot be reached.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python3 -m venv /opt/slimserve \
    && /opt/slimserve/bin/pip install --extra-index-url "$TORCH_INDEX" "torch==2.13.0+cpu"
COPY --from=wheel /wheels /wheels
RUN /opt/slimserve/bin/pip install /wheels/slimserve-*.whl

FROM python AS packages-cuda
RUN python3 -m venv /opt/slimserve \
    && /opt/slimserve/bin/pip install "torch>=2.11,<2.15" "triton>=3.6"
COPY --from=wheel /wheels /wheels
RUN wheel="$(echo /wheels/slimserve-*.whl)" && /opt/slimserve/bin/pip install "${wheel}[gpu]"

# --- What both images share.
FROM debian:bookworm-slim AS runtime
# tini reaps what a killed worker leaves behind (a compiler of GPU kernels, say) and passes signals on.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates libstdc++6 python3 tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 slimserve \
    && useradd --uid 10001 --gid 10001 --home-dir /cache --shell /usr/sbin/nologin slimserve \
    && install --directory --owner=10001 --group=10001 /cache
# The root file system may be read-only: models and compiled kernels go to /cache, sockets to /tmp.
ENV PATH=/opt/slimserve/bin:$PATH \
    HOME=/cache \
    SLIMSERVE_HOME=/cache \
    SLIMSERVE_HOST=0.0.0.0 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
# Numbers, so that Kubernetes can see that it is not root.
USER 10001:10001
WORKDIR /cache
# It fails only when a restart would help; whether requests are served is /health/ready. Nothing is answered while the
# first start pulls models, hence the long start period, which the first good answer ends.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=6 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('SLIMSERVE_PORT', '8000') + '/health/live', timeout=4)"]
# It listens beyond the container, so it wants SLIMSERVE_API_KEY or --tenants, and says so where neither is given.
ENTRYPOINT ["tini", "--", "slimserve"]
CMD ["serve"]

FROM runtime AS cuda
# Triton compiles its launchers with a C compiler, against Python's headers, when a model is first loaded.
USER 0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*
# What the NVIDIA container runtime is asked for; CUDA's own libraries come with PyTorch.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages-cuda /opt/slimserve /opt/slimserve
USER 10001:10001

# The last one, so it is what "docker build ." makes.
FROM runtime AS cpu
COPY --from=packages-cpu /opt/slimserve /opt/slimserve
