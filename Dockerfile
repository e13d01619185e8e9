ARG BASE_IMAGE=debian:trixie-slim

# s6-overlay, each tarball checked against its SHA-256 before it is unpacked. S6_OVERLAY_BASE may name a mirror of its releases, or a
# folder (file:///...); whoever puts other tarballs there gives their sums too.
FROM ${BASE_IMAGE} AS s6-overlay
ARG TARGETARCH
ARG S6_OVERLAY_VERSION=3.2.3.0
ARG S6_OVERLAY_BASE=https://github.com/just-containers/s6-overlay/releases/download
ARG S6_OVERLAY_SHA256_NOARCH=b720f9d9340efc8bb07528b9743813c836e4b02f8693d90241f047998b4c53cf
ARG S6_OVERLAY_SHA256_X86_64=a93f02882c6ed46b21e7adb5c0add86154f01236c93cd82c7d682722e8840563
ARG S6_OVERLAY_SHA256_AARCH64=0952056ff913482163cc30e35b2e944b507ba1025d78f5becbb89367bf344581
ARG S6_OVERLAY_SHA256_SYMLINKS=a60dc5235de3ecbcf874b9c1f18d73263ab99b289b9329aa950e8729c4789f0e
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates curl xz-utils \
 && rm -rf /var/lib/apt/lists/*
# /init is ours: it is s6-overlay's where it is PID 1, and hermes_boot.py where the platform has another PID 1.
# Its files lose the write permission of group 0, as which platforms run any UID: root runs them at the next start.
RUN set -eu; \
    case "${TARGETARCH:-$(dpkg --print-architecture)}" in \
      amd64) arch=x86_64; sum=$S6_OVERLAY_SHA256_X86_64 ;; \
      arm64) arch=aarch64; sum=$S6_OVERLAY_SHA256_AARCH64 ;; \
      *) echo "no s6-overlay for ${TARGETARCH}: this image is for amd64 and arm64" >&2; exit 1 ;; \
    esac; \
    mkdir /s6; \
    fetch() { \
      curl -fsSL -o /tmp/part "${S6_OVERLAY_BASE}/v${S6_OVERLAY_VERSION}/s6-overlay-$1.tar.xz"; \
      echo "$2  /tmp/part" | sha256sum -c - >/dev/null; \
      tar -C /s6 -Jxpf /tmp/part; \
    }; \
    fetch noarch "$S6_OVERLAY_SHA256_NOARCH"; \
    fetch "$arch" "$sum"; \
    fetch symlinks-noarch "$S6_OVERLAY_SHA256_SYMLINKS"; \
    mv /s6/init /s6/init.s6-overlay; \
    ln -s /opt/hermes/docker/wrapper /s6/init; \
    find /s6 ! -type l -perm /022 -exec chmod go-w {} +

# The agent, in a virtual environment that needs only Debian's python3. Bytecode is checked by the source's hash and not by its time,
# so that two builds give the same. pip stays: the agent fetches what a messaging platform needs with it, to the volume.
FROM ${BASE_IMAGE} AS agent
ARG HERMES_AGENT_VERSION=0.19.0
ARG SOURCE_DATE_EPOCH=0
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/hermes/.venv \
 && /opt/hermes/.venv/bin/pip install --no-cache-dir --no-compile "hermes-agent==${HERMES_AGENT_VERSION}" \
 && /opt/hermes/.venv/bin/pip uninstall -y setuptools \
 && find /opt/hermes/.venv -name __pycache__ -prune -exec rm -rf {} + \
 && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/hermes/.venv/lib

# Our scripts with their bytecode, which is never written at run time; an entry stub for each, which imports it and so finds that
# bytecode; the names they are called by, links to the stubs; and PATH for login shells.
COPY hermes_boot.py main_wrapper.py /opt/hermes/docker/
RUN cd /opt/hermes/docker \
 && chmod 0755 hermes_boot.py main_wrapper.py \
 && python3 -m compileall -q --invalidation-mode unchecked-hash . \
 && mkdir -p /names/etc/cont-init.d /names/etc/cont-finish.d /names/etc/profile.d /names/usr/bin ../bin \
 && for stub in boot:hermes_boot wrapper:main_wrapper; do \
      printf '%s\n' '#!/usr/bin/python3 -IBS' 'import sys' 'sys.path.insert(0, "/opt/hermes/docker")' \
        "from ${stub#*:} import main" 'sys.exit(main(sys.argv))' >"${stub%:*}"; \
      chmod 0755 "${stub%:*}"; \
    done \
 && ln -s boot stage2-hook.sh \
 && ln -s boot entrypoint.sh \
 && ln -s wrapper main-wrapper.sh \
 && ln -s ../docker/wrapper ../bin/hermes \
 && ln -s ../docker/boot ../bin/hermes-boot \
 && ln -s /opt/hermes/docker/wrapper /names/usr/bin/tini \
 && ln -s /opt/hermes/docker/boot /names/etc/cont-init.d/01-hermes-setup \
 && ln -s /opt/hermes/docker/boot /names/etc/cont-init.d/02-reconcile-profiles \
 && ln -s /opt/hermes/docker/boot /names/etc/cont-finish.d/10-hermes-shutdown \
 && printf '%s\n' 'PATH=/opt/hermes/bin:/opt/hermes/.venv/bin:$PATH:/command' 'export PATH VIRTUAL_ENV=/opt/hermes/.venv' \
      '# Not exported: a `hermes` without it takes all of the container environment, the keys given with -e too.' \
      ': "${HERMES_HOME:=$(cat /run/s6/container_environment/HERMES_HOME 2>/dev/null || echo /opt/data)}"' >/names/etc/profile.d/hermes.sh \
 && find /opt/hermes /names ! -type l -perm /022 -exec chmod go-w {} + \
 && find /opt/hermes /names -exec touch -h -d "@${SOURCE_DATE_EPOCH}" {} +

FROM ${BASE_IMAGE}
ARG HERMES_AGENT_VERSION=0.19.0
ARG SOURCE_DATE_EPOCH=0
LABEL org.opencontainers.image.title="Hermes Agent" \
      org.opencontainers.image.description="A self-improving AI agent, its gateways supervised by s6" \
      org.opencontainers.image.version="${HERMES_AGENT_VERSION}" \
      org.opencontainers.image.licenses="MIT"
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates python3 \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/ldconfig/aux-cache /var/log/apt /var/log/*.log \
 && groupadd --gid 10000 hermes \
 && useradd --uid 10000 --gid 10000 --home-dir /opt/data --no-create-home --shell /bin/bash hermes \
 && install -d -o hermes -g hermes /opt/data \
 && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
COPY --from=s6-overlay /s6/ /
COPY --from=agent /opt/hermes/ /opt/hermes/
COPY --from=agent /names/ /
COPY s6-rc.d/ /etc/s6-overlay/s6-rc.d/

# S6_KILL_GRACETIME is a fixed wait at every end (0 would mean 3000); gateways drain before it, in cont-finish.d, and pay none of it.
# That script bounds itself by HERMES_SHUTDOWN_TIMEOUT; s6-overlay's own limit on it, 5000, would cut it short.
# A failing setup ends the container (2). Services may take as long as they need (0): s6-rc would stop the boot after 5 seconds, and
# a first boot may have a whole NAS share to give to hermes.
# The agent's own environment is sealed; packages that it fetches go to the volume, behind its own on its path.
ENV HERMES_HOME=/opt/data \
    HERMES_DISABLE_LAZY_INSTALLS=1 \
    HERMES_LAZY_INSTALL_TARGET=/opt/data/lazy-packages \
    PATH=/opt/hermes/bin:/opt/hermes/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/command \
    VIRTUAL_ENV=/opt/hermes/.venv \
    S6_BEHAVIOUR_IF_STAGE2_FAILS=2 \
    S6_CMD_WAIT_FOR_SERVICES_MAXTIME=0 \
    S6_KILL_FINISH_MAXTIME=86400000 \
    S6_KILL_GRACETIME=10 \
    S6_VERBOSITY=0
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 CMD ["/opt/hermes/bin/hermes-boot", "health"]
WORKDIR /opt/data
VOLUME /opt/data
ENTRYPOINT ["/init", "/opt/hermes/docker/main-wrapper.sh"]
