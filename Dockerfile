ARG BASE_IMAGE=debian:trixie-slim
ARG HERMES_AGENT_VERSION=0.19.0

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
# /init is ours: it runs s6-overlay's own where that can start, else hermes_boot.py.
# rc.shutdown, which every end of the container runs, waits until a boot is over, however long that takes. So a line is added to it
# that ends the boot first.
# When a command ends by a signal, the shell of rc.init says so on the terminal, which may be stopped: then it would wait for ever.
# s6-overlay's files lose the write permission of group 0, as which platforms run any UID: root runs them at the next start. And its
# setuid program loses that bit: for PID 1, which with --user is hermes's, it would run anything as root.
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
    sed -i '1a [ -e /run/hermes-command ] || /opt/hermes/bin/hermes-boot end-boot' /s6/package/admin/s6-overlay/etc/s6-linux-init/skel/rc.shutdown; \
    sed -i 's|^    $arg0 "$@"$|    exec 3>\&2 2>/dev/null; (exec $arg0 "$@" 2>\&3 3>\&-)|' /s6/package/admin/s6-overlay/etc/s6-linux-init/skel/rc.init; \
    find /s6 ! -type l -perm /6022 -exec chmod a-s,go-w {} +

# What the image and the agent's build both stand on: python3, the programs that the agent calls, the user hermes. SQLite comes from
# forky, by a pin for that one package: with trixie's 3.46.1 two processes that write can corrupt a database in WAL mode (fixed in
# 3.51.3). Whatever version forky has (SQLITE_VERSION=3.53.4-2 asks for one) is tried below.
FROM ${BASE_IMAGE} AS system
ARG APT_PACKAGES="git ripgrep openssh-client procps curl less"
ARG SQLITE_VERSION=*
ARG DEBIAN_MIRROR=http://deb.debian.org/debian
ARG SOURCE_DATE_EPOCH=0
RUN set -eu; \
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] ${DEBIAN_MIRROR} forky main" >/etc/apt/sources.list.d/forky.list; \
    printf '%s\n' 'Package: *' 'Pin: release n=forky' 'Pin-Priority: 100' '' \
      'Package: libsqlite3-0' 'Pin: release n=forky' 'Pin-Priority: 990' >/etc/apt/preferences.d/forky; \
    apt-get update; \
    apt-get install -y --no-install-recommends ca-certificates python3 "libsqlite3-0=${SQLITE_VERSION}" ${APT_PACKAGES}; \
    rm -rf /etc/apt/sources.list.d/forky.list /etc/apt/preferences.d/forky /var/lib/apt/lists/* /var/cache/apt/*.bin \
      /var/cache/ldconfig/aux-cache /var/cache/debconf/*-old /var/log/apt /var/log/*.log; \
    groupadd --gid 10000 hermes; \
    useradd --uid 10000 --gid 10000 --home-dir /opt/data --no-create-home --shell /bin/bash hermes; \
    install -d -o hermes -g hermes /opt/data; \
    install -d -o hermes -g root -m 0775 /run; \
    find / -xdev -type f -perm /6000 -exec chmod a-s {} +; \
    rm -rf /run/lock /var/tmp; \
    ln -s ../tmp /var/tmp

# The agent, in a virtual environment of Debian's python3. AGENT_SOURCE is any requirement that pip takes; what lies in the folder
# agent-source beside this file is in /agent-source. Bytecode is checked by the source's hash and not by its time, and made by one
# process, in order, so that two builds give the same. The environment is root's, so pip, which stays, installs for hermes where a
# user's packages go, on the volume; for that the environment has to see the system's packages.
FROM system AS agent
ARG HERMES_AGENT_VERSION
ARG HERMES_AGENT_EXTRAS=messaging,cli,mcp,acp,homeassistant,sms,web,anthropic
ARG AGENT_SOURCE=hermes-agent==${HERMES_AGENT_VERSION}
ARG SOURCE_DATE_EPOCH=0
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/*
COPY LICENSE agent-source* /agent-source/
RUN set -eu; \
    python3 -m venv /opt/hermes/.venv; \
    cd /opt/hermes/.venv; \
    bin/pip install --no-cache-dir --no-compile "${AGENT_SOURCE}" "hermes-agent[${HERMES_AGENT_EXTRAS}]"; \
    bin/pip uninstall -y setuptools; \
    found=$(bin/python -c 'from importlib.metadata import version; print(version("hermes-agent"))'); \
    [ "$found" = "$HERMES_AGENT_VERSION" ] || { echo "AGENT_SOURCE is $found: build with HERMES_AGENT_VERSION=$found" >&2; exit 1; }; \
    echo docker >"$(bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/.install_method"; \
    sed -i 's/^\(include-system-site-packages = \)false$/\1true/' pyvenv.cfg; \
    find . -name __pycache__ -prune -exec rm -rf {} +; \
    PYTHONHASHSEED=0 python3 -m compileall -q --invalidation-mode unchecked-hash lib; \
    find . ! -type l -perm /022 -exec chmod go-w {} +; \
    find /opt/hermes -exec touch -h -d "@${SOURCE_DATE_EPOCH}" {} +
RUN for python in python3 /opt/hermes/.venv/bin/python; do \
      "$python" -B -c 'import sqlite3, sys; \
db = sqlite3.connect(":memory:"); \
db.execute("CREATE VIRTUAL TABLE texts USING fts5(text, tokenize = trigram)"); \
db.execute("INSERT INTO texts VALUES (?)", ["supervision"]); \
found = db.execute("SELECT count(*) FROM texts WHERE texts MATCH ?", ["ervis"]).fetchone(); \
sys.exit(sqlite3.sqlite_version_info < (3, 51, 3) and f"SQLite {sqlite3.sqlite_version} is linked: take 3.51.3 or later" or found != (1,))' \
      || exit 1; \
    done

# Our scripts with their bytecode, which is never written at run time; an entry stub for each, which imports it and so finds that
# bytecode, and leaves out the interpreter's own end, which takes 2 ms; the names they are called by, links to the stubs; and PATH for
# login shells.
FROM system AS scripts
ARG SOURCE_DATE_EPOCH=0
COPY hermes_boot.py main_wrapper.py LICENSE /opt/hermes/docker/
RUN cd /opt/hermes/docker \
 && chmod 0755 hermes_boot.py main_wrapper.py \
 && python3 -m compileall -q --invalidation-mode unchecked-hash . \
 && mkdir -p /names/etc/cont-init.d /names/etc/cont-finish.d /names/etc/profile.d /names/usr/bin ../bin \
 && for stub in boot:hermes_boot wrapper:main_wrapper; do \
      printf '%s\n' '#!/usr/bin/python3 -IBS' 'import os, sys' 'sys.path.insert(0, "/opt/hermes/docker")' \
        "from ${stub#*:} import main" 'os._exit(main(sys.argv))' >"${stub%:*}"; \
      chmod 0755 "${stub%:*}"; \
    done \
 && printf '%s\n' '#!/bin/sh' '[ "$RC_NAME" = legacy-cont-init ] && [ -e /run/hermes-reconciled ] ||' \
      '  exec /opt/hermes/docker/02-reconcile-profiles' >reconcile \
 && printf '%s\n' '#!/bin/sh' 'work() { exec /opt/hermes/docker/10-hermes-shutdown; }' '[ ! -t 2 ] || work # its output may be stopped' \
      'for slot in /run/service/gateway-*; do [ -e "$slot/down" ] || [ ! -e "$slot/run" ] || work; done # s6 may be about to start it' \
      'for comm in /proc/[0-9]*/comm; do' '  read -r name 2>/dev/null <"$comm" || { [ ! -e "$comm" ] || work; continue; }' \
      '  case $name in s6-supervise | s6-svscan | s6-log | s6-linux-init-s | s6-ipcserverd | s6-rc | s6-sudo[cd]) ;;' \
      '    s6-maximumtime | cont-finish | 10-hermes-shutd) ;; *) work ;; esac' 'done' >shutdown \
 && chmod 0755 reconcile shutdown \
 && ln -s boot 02-reconcile-profiles \
 && ln -s boot 10-hermes-shutdown \
 && ln -s boot stage2-hook.sh \
 && ln -s boot entrypoint.sh \
 && ln -s wrapper main-wrapper.sh \
 && ln -s ../docker/wrapper ../bin/hermes \
 && ln -s ../docker/boot ../bin/hermes-boot \
 && ln -s /opt/hermes/docker/wrapper /names/usr/bin/tini \
 && ln -s /opt/hermes/docker/boot /names/etc/cont-init.d/01-hermes-setup \
 && ln -s /opt/hermes/docker/reconcile /names/etc/cont-init.d/02-reconcile-profiles \
 && ln -s /opt/hermes/docker/shutdown /names/etc/cont-finish.d/10-hermes-shutdown \
 && printf '%s\n' '# /etc/profile has set PATH anew: the one of the container goes before that.' \
      'PATH="$(cat /run/s6/container_environment/PATH 2>/dev/null || echo /opt/hermes/bin:/opt/hermes/.venv/bin):$PATH:/command"' \
      'case ":$PATH:" in *:/opt/hermes/bin:*) ;; *) PATH="/opt/hermes/bin:/opt/hermes/.venv/bin:$PATH" ;; esac' \
      'export PATH VIRTUAL_ENV=/opt/hermes/.venv' \
      '# Not exported: a `hermes` without it takes all of the container environment, the keys given with -e too.' \
      ': "${HERMES_HOME:=$(cat /run/s6/container_environment/HERMES_HOME 2>/dev/null || echo /opt/data)}"' \
      '# The commands that `hermes profile create` makes there are not for root.' \
      '[ "$(id -u)" = 0 ] || PATH="$PATH:${HERMES_HOME%%/profiles/*}/.local/bin"' >/names/etc/profile.d/hermes.sh \
 && find /opt/hermes /names ! -type l -perm /022 -exec chmod go-w {} + \
 && find /opt/hermes /names -exec touch -h -d "@${SOURCE_DATE_EPOCH}" {} +

FROM system
ARG BASE_IMAGE
ARG HERMES_AGENT_VERSION
LABEL org.opencontainers.image.title="Hermes Agent" \
      org.opencontainers.image.description="A self-improving AI agent, its gateways supervised by s6" \
      org.opencontainers.image.version="${HERMES_AGENT_VERSION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.licenses="MIT"
COPY --from=s6-overlay /s6/ /
COPY --from=agent /opt/hermes/ /opt/hermes/
COPY --from=scripts /opt/hermes/ /opt/hermes/
COPY --from=scripts /names/ /
COPY s6-rc.d/ /etc/s6-overlay/s6-rc.d/

# S6_KILL_GRACETIME is a fixed wait at every end (0 would mean 3000); gateways drain before it, in cont-finish.d, and pay none of it.
# That script bounds itself by HERMES_SHUTDOWN_TIMEOUT; s6-overlay's own limit on it, 5000, would cut it short.
# A failing setup ends the container (2). Services may take as long as they need (0): a first boot may have a whole NAS share to give
# to hermes.
# The agent's own environment is sealed; packages that it fetches go to the volume, behind its own on its path.
ENV HERMES_HOME=/opt/data \
    HERMES_DISABLE_LAZY_INSTALLS=1 \
    PATH=/opt/hermes/bin:/opt/hermes/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/command \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
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
