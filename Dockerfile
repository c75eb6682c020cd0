# The engine on NVIDIA's PyTorch image, whose torch and triton are kept. Targets: runtime (the default) and test.
#
# The tag fixes the release. To fix the bytes as well, look the digest up once and build from it:
#   docker buildx imagetools inspect nvcr.io/nvidia/pytorch:26.05-py3
#   docker build --build-arg BASE_IMAGE=nvcr.io/nvidia/pytorch@sha256:DIGEST .
# Any Debian or Ubuntu image with Python 3.10 to 3.13, its venv module, pip and torch >= 2.10 will do.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.05-py3
ARG SOURCE_DATE_EPOCH=315532800

FROM ${BASE_IMAGE} AS base
# An empty PIP_CONSTRAINT, because the base pins packages of the locks to other versions. PYTHON_EXEC, because torchrun is
# the base's, and would start its processes with the base's Python.
ENV PIP_CONSTRAINT="" \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHON_EXEC=/opt/soflow/bin/python \
    VIRTUAL_ENV=/opt/soflow \
    PATH=/opt/soflow/bin:${PATH}
# useradd writes a date; Ubuntu's makes homes that nobody else may enter.
ARG SOURCE_DATE_EPOCH
RUN useradd --create-home --uid 10001 soflow && chmod 755 /home/soflow

FROM base AS build
# gpu brings DALI; runtime is without.
ARG LOCK=gpu
ARG SOURCE_DATE_EPOCH
# System site packages give the environment the base's torch, and the base's pip.
RUN python3 -m venv --system-site-packages --without-pip "${VIRTUAL_ENV}"
WORKDIR /build
COPY requirements/ requirements/
RUN python -m pip install --require-hashes -r "requirements/${LOCK}.lock"
COPY LICENSE MANIFEST.in README.md pyproject.toml setup.py ./
COPY csrc/ csrc/
COPY kernels/ kernels/
COPY soflow/ soflow/
# What builds the CUDA extension, where the base has nvcc, stays out of the environment. The wheel keeps the modes of its
# files, whatever the umask of the checkout.
RUN chmod -R u=rwX,go=rX . \
    && python -m pip install --require-hashes --target tools -r requirements/build.lock \
    && PYTHONPATH=tools python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist . \
    && python -m pip install --no-index --no-deps dist/*.whl

FROM build AS test
RUN python -m pip install --require-hashes -r requirements/dev.lock
RUN python -c "import triton" || python -m pip install --require-hashes -r requirements/triton.lock
USER 10001
WORKDIR /home/soflow
COPY --chown=10001:10001 . source/
WORKDIR /home/soflow/source
RUN python -m pytest
RUN python train.py configs/digits.yaml && python -m bench.digits runs/digits
RUN torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node=2 train.py configs/digits.yaml name=two train.total_steps=2

FROM base AS runtime
LABEL org.opencontainers.image.title="soflow" \
      org.opencontainers.image.licenses="MIT"
# For any --user, with a read-only root too: caches go to /tmp, and who has no entry in /etc/passwd has a name.
ENV HOME=/tmp \
    USER=soflow
COPY --from=build /opt/soflow /opt/soflow
WORKDIR /home/soflow
COPY train.py ./
COPY configs/ configs/
COPY launch/torchrun.sh launch/
# A volume mounted at runs takes its owner from here.
RUN chmod -R u=rwX,go=rX train.py configs launch && install --directory --owner=10001 --group=10001 runs
USER 10001
CMD ["soflow", "--help"]
