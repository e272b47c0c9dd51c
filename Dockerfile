# Tenora's image. One argument chooses what it runs on:
#   docker build --tag tenora:0.1.0-cpu .
#   docker build --tag tenora:0.1.0-gpu --build-arg VARIANT=gpu .
# Behind a private package index, or to take PyTorch from an index of CPU-only builds (the default index's holds CUDA
# and is gigabytes larger), mount a pip.conf:
#   docker build --secret id=pip,src=pip.conf .
# BASE_IMAGE may be any Debian or Ubuntu with python3.11 on the PATH, with its venv module and, for a GPU, its headers.
ARG BASE_IMAGE=python:3.11-slim-trixie
ARG VARIANT=cpu

FROM ${BASE_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python3.11 -m venv /opt/tenora
ENV PATH=/opt/tenora/bin:$PATH
# The dependencies first: PyTorch is most of the image, and a change of the code is no reason to fetch it again.
COPY pyproject.toml constraints.txt ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf,required=false \
    python -c 'import tomllib; \
               project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
               needs = project["dependencies"] + project["optional-dependencies"]["postgres"]; \
               print(*(name for name in needs if name != "tenora-client"), sep="\n")' > dependencies.txt \
    && pip install --constraint constraints.txt --upgrade pip \
    && pip install --constraint constraints.txt --requirement dependencies.txt
COPY README.md LICENSE ./
COPY clients/python clients/python
COPY kernels kernels
COPY service service
RUN --mount=type=secret,id=pip,target=/etc/pip.conf,required=false \
    pip install --constraint constraints.txt ./clients/python '.[postgres]'
# The CPU's kernels, for every processor with AVX2 or AVX-512: the first start need not compile them.
RUN case "$(uname -m)" in x86_64) set -- x86-64-v3 x86-64-v4 ;; esac \
    && python -m tenora_kernels.cpu.precompile "$@"

FROM ${BASE_IMAGE} AS runtime-cpu

FROM ${BASE_IMAGE} AS runtime-gpu
# Triton compiles a small launcher in C for each kernel when it first runs. The driver comes from the host, with NVIDIA's
# container runtime; CUDA's libraries come with PyTorch. The base image's release of Debian settles the versions: a pin here
# would fail with each of its updates.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# A stage of this file, chosen by VARIANT: it has no tag.
# hadolint ignore=DL3006
FROM runtime-${VARIANT}
LABEL org.opencontainers.image.title="tenora" \
      org.opencontainers.image.description="Train and serve many tenants' LoRA adapters on one frozen base model" \
      org.opencontainers.image.licenses="Apache-2.0"
# A number, not a name: Kubernetes can then see that it is not root.
RUN groupadd --gid 10001 tenora \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/tenora --shell /usr/sbin/nologin tenora \
    && install --directory --owner=10001 --group=10001 --mode=0750 /var/lib/tenora
COPY --from=build /opt/tenora /opt/tenora
# Everything that is written goes to TENORA_HOME, a volume, or to /tmp: the root file system may be read-only.
ENV PATH=/opt/tenora/bin:$PATH \
    HOME=/var/lib/tenora \
    TENORA_HOME=/var/lib/tenora \
    TENORA_HOST=0.0.0.0 \
    NUMBA_CACHE_DIR=/var/lib/tenora/cache/numba \
    TRITON_CACHE_DIR=/var/lib/tenora/cache/triton \
    HF_HOME=/var/lib/tenora/cache/huggingface \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /var/lib/tenora
EXPOSE 8000
# SIGTERM starts the drain: open requests finish, then the process exits with 0.
STOPSIGNAL SIGTERM
# No HEALTHCHECK: the OCI format has none and Kubernetes ignores it; the chart probes /livez and /readyz, which know more than
# a process being there (a stopped engine, a drain).
ENTRYPOINT ["tenora"]
CMD ["serve"]
