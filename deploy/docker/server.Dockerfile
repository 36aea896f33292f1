# The federation's server: SuperLink, gateway, joining port and backbone service.
#
#   docker build -f deploy/docker/server.Dockerfile -t fedgraft-server:0.1.0 .
#
# Run it from the root of the repository. To install from a mirror, give pip's configuration as a
# build secret, which stays out of the image: --secret id=pip,src=pip.conf. Through the same file
# a CPU build of torch may be chosen; the server needs no GPU.

FROM python:3.11.13-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/fedgraft
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY common common
COPY client client
COPY server server
COPY simulations simulations
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/fedgraft/bin/pip install --no-cache-dir --constraint constraints.txt .

FROM python:3.11.13-slim-bookworm
LABEL org.opencontainers.image.title="fedgraft-server" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 fedgraft \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/fedgraft \
       --shell /usr/sbin/nologin fedgraft \
    && install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/fedgraft
COPY --from=build /opt/fedgraft /opt/fedgraft
COPY deploy/docker/server_health.py /opt/fedgraft/server_health.py
ENV PATH=/opt/fedgraft/bin:$PATH \
    HOME=/var/lib/fedgraft \
    FEDGRAFT_SERVER_DIR=/var/lib/fedgraft/server \
    FEDGRAFT_LOG_JSON=1 \
    FLWR_TELEMETRY_ENABLED=0 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /var/lib/fedgraft
# By number, so that Kubernetes can see that it is not root.
USER 10001:10001
VOLUME ["/var/lib/fedgraft"]
# For sites, for joining, for backbones. The SuperLink's port, the next one, stays shut.
EXPOSE 9443 9444 9445
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "/opt/fedgraft/server_health.py"]
ENTRYPOINT ["fedgraft"]
CMD ["server", "up"]
