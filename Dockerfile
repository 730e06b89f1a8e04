# foreroute in an image:
#
#     docker build -t foreroute .                                     # for NVIDIA GPUs
#     docker build -t foreroute-cpu --build-arg BASE=ubuntu:24.04 .   # without; TORCH_INDEX: see below
#     docker run --rm --gpus all --ipc host foreroute launch/recipes/image_smoke.sh
#
# Runs lie in /workspace/runs. To keep them, mount a folder there, and build with its owner: --build-arg UID=$(id -u), then
# docker run -v "$PWD/runs:/workspace/runs" ...
#
# The versions of all Python packages are in constraints.txt. PyTorch's wheel brings CUDA, cuDNN and NCCL; of the base
# image only the driver's requirements are used.
ARG BASE=nvidia/cuda:13.0.2-base-ubuntu24.04
FROM ${BASE}

ARG PYTHON=3.12
ARG PIP_VERSION=26.3
# Where torch comes from if not from the default index, such as PyTorch's own index of wheels for CPUs, a tenth of the size.
ARG TORCH_INDEX=
ARG UID=10001

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# gcc and Python's headers: Triton compiles a stub for every kernel at run time. ssh and pdsh: for mpirun and deepspeed.
# No versions here: the distribution keeps only the newest of its packages.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        "python${PYTHON}" "python${PYTHON}-dev" "python${PYTHON}-venv" gcc libc6-dev openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/* \
    && { user=$(getent passwd "${UID}" | cut -d: -f1); [ -z "${user}" ] || userdel --remove "${user}"; } \
    && useradd --uid "${UID}" --create-home foreroute \
    && install -d -o foreroute /workspace

USER ${UID}
WORKDIR /workspace
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# Packages first, with empty ones of ours, so that a change of the code does not install them again.
COPY --chown=foreroute pyproject.toml constraints.txt ./
RUN "python${PYTHON}" -m venv .venv \
    && .venv/bin/python -m pip install "pip==${PIP_VERSION}" \
    && .venv/bin/python -m pip install "$(grep '^torch==' constraints.txt)" ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} \
    && mkdir foreroute \
    && echo '__version__ = "0"' > foreroute/__init__.py \
    && .venv/bin/python -m pip install -c constraints.txt -e ".[mpi]" \
    && .venv/bin/python -m pip check

COPY --chown=foreroute . .
ENV PATH=/workspace/.venv/bin:${PATH}
CMD ["python", "-m", "launch.train", "experiment=debug"]
