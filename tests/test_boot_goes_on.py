"""Where a setting or a limit takes something away from a container, its boot goes on, and its command runs."""

from __future__ import annotations

import pytest
from sandbox import ENTRYPOINT

PLACES = pytest.mark.parametrize("entrypoint", [(), ENTRYPOINT], ids=["PID 1", "below another"])


@PLACES
@pytest.mark.parametrize("scandir", ["/run/nobodys", "/opt/data/slots/", ""])
@pytest.mark.parametrize("keep", ["0", "1"])
def test_a_scandir_that_nobody_watches_ends_no_boot(container, entrypoint, scandir, keep):
    """The variable reaches what takes the slots up where the environment is kept, and below another PID 1; empty, it is
    not set."""
    environment = {"S6_PROFILE_GATEWAY_SCANDIR": scandir, "S6_KEEP_ENV": keep}
    box = container(environment=environment | {"HERMES_GATEWAY_BOOTSTRAP_STATE": "running"}, entrypoint=entrypoint)
    box.put_agent("#!/bin/sh\nexec sleep infinity\n")
    slot = f"{scandir or '/run/service'}/gateway-default"
    watched = bool(entrypoint) or not scandir
    done = box.run("sh", "-c", f"s6-svwait -t 5000 -u {slot}" if watched else f"ls {slot}/run")
    assert done.returncode == 0 and b"warning" not in done.stderr, done
