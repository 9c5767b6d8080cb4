# blip2 with its server. CPU: docker build -t blip2 .    CUDA: docker build -t blip2 --build-arg TORCH=cu130 .
# TORCH is a folder of https://download.pytorch.org/whl that has the torch of constraints.txt. docs/guides/containers.md
# says how to run it.
ARG PYTHON=3.13

FROM python:${PYTHON}-slim-bookworm AS build
# A compiler for the kernels; git, which knows the version. Neither is in the image that runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc git libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/blip2
ENV PATH=/opt/blip2/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt .
ARG TORCH=cpu
# By itself, so that a change of the code does not fetch it again.
RUN pip install --constraint constraints.txt --index-url "https://download.pytorch.org/whl/${TORCH}" torch
COPY . .
RUN pip install --constraint constraints.txt '.[serve,chat,heif]' \
    && python .ci/wheel.py

FROM python:${PYTHON}-slim-bookworm
# 101 is the group of nginx in its image: it may use the server's socket, as docs/serving.md has it.
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin blip2 \
    && install --directory --owner=blip2 --group=blip2 /models \
    && install --directory --owner=blip2 --group=101 --mode=2750 /run/blip2
COPY --from=build /opt/blip2 /opt/blip2
COPY docker/ready.py /opt/blip2/ready.py
# Downloads go to a volume at /models, models of your own are mounted below it.
ENV PATH=/opt/blip2/bin:$PATH HF_HOME=/models/hub PYTHONUNBUFFERED=1
USER 10001
WORKDIR /models
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m --start-interval=5s --retries=3 \
    CMD ["python", "/opt/blip2/ready.py"]
ENTRYPOINT ["blip2"]
CMD ["serve", "--host", "0.0.0.0"]
