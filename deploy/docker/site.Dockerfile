# A site's resident daemon, with CUDA.
#
#   docker build -f deploy/docker/site.Dockerfile -t fedgraft-site:0.1.0 .
#
# Run it from the root of the repository; pip's configuration as a build secret, as in
# server.Dockerfile. torch's wheels bring their own CUDA libraries, so the small `base` image is
# enough: it tells NVIDIA's container toolkit which driver is needed. It also runs without a GPU
# (device = "cpu").

FROM nvidia/cuda:13.0.1-base-ubi9 AS build
# UBI 9's own Python is 3.9. The package's name fixes 3.11; its patches come with each build.
# hadolint ignore=DL3041
RUN dnf install --assumeyes --setopt=install_weak_deps=False python3.11 python3.11-pip \
    && dnf clean all
WORKDIR /src
RUN python3.11 -m venv /opt/fedgraft
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY common common
COPY client client
COPY server server
COPY simulations simulations
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/fedgraft/bin/pip install --no-cache-dir --constraint constraints.txt .

FROM nvidia/cuda:13.0.1-base-ubi9
LABEL org.opencontainers.image.title="fedgraft-site" \
      org.opencontainers.image.licenses="Apache-2.0"
# hadolint ignore=DL3041
RUN dnf install --assumeyes --setopt=install_weak_deps=False python3.11 \
    && dnf clean all \
    && echo 'fedgraft:x:10002:10002::/var/lib/fedgraft:/sbin/nologin' >> /etc/passwd \
    && echo 'fedgraft:x:10002:' >> /etc/group \
    && install --directory --owner=10002 --group=10002 --mode=0700 \
       /var/lib/fedgraft /var/lib/fedgraft-witness \
    && install --directory --mode=0755 /etc/fedgraft /data
COPY --from=build /opt/fedgraft /opt/fedgraft
COPY deploy/docker/site_health.py /opt/fedgraft/site_health.py
ENV PATH=/opt/fedgraft/bin:$PATH \
    HOME=/var/lib/fedgraft \
    HF_HUB_OFFLINE=1 \
    FEDGRAFT_SITE=/etc/fedgraft/site.toml \
    FEDGRAFT_SITE_HOME=/var/lib/fedgraft/home/identity \
    FEDGRAFT_LOG_JSON=1 \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_HOME=/var/lib/fedgraft/flower \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /var/lib/fedgraft
USER 10002:10002
VOLUME ["/var/lib/fedgraft", "/var/lib/fedgraft-witness"]
# Nothing is exposed: a site only calls.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python", "/opt/fedgraft/site_health.py"]
ENTRYPOINT ["fedgraft"]
CMD ["site", "up"]
