"""What deploy/ offers to copy is run: scripts, the commands of the units with the example settings, the proxy."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import ssl
import stat
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from experiments.engine import EngineError, free_port
from experiments.flwr_commands import Flwr
from experiments.processes import Processes
from tests.end_to_end.conftest import ROOT

DEPLOY = ROOT / "deploy"
SCRIPTS = sorted(DEPLOY.glob("*.sh"))
UNITS = sorted(DEPLOY.glob("*.service"))


def script(name: str, *arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(DEPLOY / name), *map(str, arguments)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def certificate(file: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(file.read_bytes())


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def test_certificates_hold_the_names_and_keys_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    done = script("make-certificates.sh", tmp_path, "fl.example.org", "192.0.2.10", "127.0.0.1", "2001:db8::1")
    assert done.returncode == 0, done.stderr
    server, authority = certificate(tmp_path / "server.crt"), certificate(tmp_path / "ca.crt")
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org"]
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    # The SuperLink's own ServerApps come from the first two.
    assert addresses == ["127.0.0.1", "::1", "192.0.2.10", "2001:db8::1"]
    server.verify_directly_issued_by(authority)
    assert 364 <= (server.not_valid_after_utc - server.not_valid_before_utc).days <= 365
    assert {file.name: mode(file) for file in tmp_path.iterdir()} == {
        "ca.key": 0o600,
        "server.key": 0o600,
        "ca.crt": 0o644,
        "server.crt": 0o644,
    }


def test_the_units_user_can_pass_to_its_files(tmp_path: Path) -> None:
    script("make-certificates.sh", tmp_path / "etc" / "certificates", "fl.example.org")
    script("make-node-key.sh", tmp_path / "var" / "keys" / "node-0")
    assert {mode(tmp_path / name) for name in ("etc", "var")} == {0o755}
    assert {mode(tmp_path / name) for name in ("etc/certificates", "var/keys")} == {0o700}


def test_an_authority_whose_key_is_elsewhere_is_not_replaced(tmp_path: Path) -> None:
    script("make-certificates.sh", tmp_path, "fl.example.org")
    (tmp_path / "ca.key").rename(tmp_path / "safe")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    done = script("make-certificates.sh", tmp_path, "fl.example.org")
    assert done.returncode == 1 and "bring ca.key back to renew" in done.stderr
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_a_renewed_key_is_of_whom_the_folder_is(tmp_path: Path) -> None:
    folder = tmp_path / "certificates"
    script("make-certificates.sh", folder, "fl.example.org")
    for one in (folder, *folder.iterdir()):
        os.chown(one, 65534, 65534)
    script("make-certificates.sh", folder, "fl.example.org")
    assert {one.stat().st_uid for one in folder.iterdir()} == {65534}


def test_a_second_run_renews_the_certificate_and_keeps_the_authority(tmp_path: Path) -> None:
    script("make-certificates.sh", tmp_path, "fl.example.org")
    authority, first = (tmp_path / "ca.crt").read_bytes(), certificate(tmp_path / "server.crt")
    done = script("make-certificates.sh", tmp_path, "other.example.org", SERVER_DAYS="7")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ca.crt").read_bytes() == authority
    second = certificate(tmp_path / "server.crt")
    assert second.serial_number != first.serial_number
    assert (second.not_valid_after_utc - second.not_valid_before_utc).days == 7


@pytest.mark.parametrize("wrong", ["fl.example.org:443", "192.0.2.10:443", "two names", "", "1.2.3.4.5"])
def test_what_is_no_name_is_refused_in_one_sentence_and_changes_nothing(tmp_path: Path, wrong: str) -> None:
    script("make-certificates.sh", tmp_path, "fl.example.org")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    done = script("make-certificates.sh", tmp_path, wrong)
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1 and wrong in done.stderr
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_node_key_is_made_once(tmp_path: Path) -> None:
    file = tmp_path / "keys" / "node-3"
    assert script("make-node-key.sh", file).returncode == 0
    key = load_ssh_private_key(file.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp384r1"
    assert mode(file) == 0o600
    again = script("make-node-key.sh", file)
    assert again.returncode == 1
    assert again.stderr.startswith(f"{file} is there already, and a node is known by its key: ")
    assert load_ssh_private_key(file.read_bytes(), None).private_numbers() == key.private_numbers()  # type: ignore[union-attr]


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_a_script_without_arguments_says_how_it_is_used(file: Path) -> None:
    done = script(file.name)
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: ") and len(done.stderr.splitlines()) == 1
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", str(file)], capture_output=True, text=True, check=False).stdout == ""


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not there")
@pytest.mark.parametrize("unit", UNITS, ids=lambda file: file.name)
def test_systemd_finds_nothing_wrong_with_a_unit(unit: Path, tmp_path: Path) -> None:
    # It looks whether the programs exist.
    (tmp_path / unit.name).write_text(
        unit.read_text().replace("/opt/fl-gradcode/bin", str(Path(sys.executable).parent))
    )
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / unit.name)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, [line for line in done.stderr.splitlines() if unit.name in line]) == (0, [])


def test_all_files_agree_on_where_certificates_are(tmp_path: Path) -> None:
    script("make-certificates.sh", tmp_path, "fl.example.org")
    named = {
        match
        for file in DEPLOY.iterdir()
        for match in re.findall(r"/etc/fl-gradcode/certificates/([a-z.]+)", file.read_text())
    }
    assert named == {"ca.crt", "server.crt", "server.key"}
    assert all((tmp_path / name).exists() for name in named)


@dataclass
class Deployment:
    """The units' commands with the example settings, on this machine.

    Attributes:
        home: What stands for /etc and /var/lib.
        address: Of the SuperLink.
    """

    home: Path
    address: str
    processes: Processes
    flwr: Flwr

    def here(self, text: str) -> str:
        """The text with paths and addresses of this test instead of the examples'."""
        port = self.address.partition(":")[2]
        text = text.replace("127.0.0.1:8000", self.address).replace("fl.example.org:443", self.address)
        text = text.replace("PORT=8000", f"PORT={port}").replace("PORT=9094", f"PORT={free_port()}")
        text = text.replace("/opt/fl-gradcode/bin", str(Path(sys.executable).parent))
        return text.replace("/etc/fl-gradcode", str(self.home / "etc")).replace("%S", str(self.home / "state"))

    def start(self, unit: str, instance: str) -> None:
        """As systemd would: its environment, then ExecStart with each ${NAME} as one argument."""
        text = self.here((DEPLOY / unit).read_text()).replace("%i", instance).replace("\\\n", "")
        settings = [line.split("=", 1) for line in text.splitlines() if re.match("[A-Z][A-Za-z]+=", line)]
        environment: dict[str, str] = {}
        for key, value in settings:
            if key == "Environment":
                environment |= variables(value.split())
            if key == "EnvironmentFile":
                environment |= variables(Path(value).read_text().splitlines())
        (command,) = [shlex.split(value) for key, value in settings if key == "ExecStart"]
        command = [re.sub(r"\$\{([A-Z_]+)\}", lambda match: environment[match[1]], word) for word in command]
        (self.home / "state" / "fl-gradcode" / instance).mkdir(parents=True)
        self.processes.environment = environment
        self.processes.start(command, instance)


def variables(lines: list[str]) -> dict[str, str]:
    pairs = [line.split("=", 1) for line in lines if line and not line.startswith("#")]
    return {name: "".join(shlex.split(value)) for name, value in pairs}


def wait_for(true: Callable[[], bool], *, seconds: float = 60.0) -> None:
    """Until it is true; the SuperLink may be starting meanwhile."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(EngineError):
            if true():
                return
        time.sleep(0.2)
    raise AssertionError("it never came true")


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    home = tmp_path_factory.mktemp("deploy")
    config = home / "flwr-home" / "config.toml"
    environment = {
        **os.environ,
        "FLWR_HOME": str(config.parent),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    processes = Processes(home, environment)
    deployment = Deployment(home, f"127.0.0.1:{free_port()}", processes, Flwr(environment, "lab"))
    for file in (home / "etc" / "superlink.env", home / "etc" / "node-0.env"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(deployment.here((DEPLOY / file.name).read_text()))
    config.parent.mkdir()
    config.write_text(deployment.here((DEPLOY / "flwr-config.toml").read_text()))
    assert tomllib.loads(config.read_text())["superlink"]["default"] == "lab"
    assert script("make-certificates.sh", home / "etc" / "certificates", "fl.example.org").returncode == 0
    assert script("make-node-key.sh", home / "etc" / "keys" / "node-0").returncode == 0
    try:
        deployment.start("superlink.service", "superlink")
        yield deployment
    finally:
        processes.stop_all()


@pytest.mark.slow
def test_the_units_start_a_superlink_and_a_node_that_it_knows(deployment: Deployment) -> None:
    wait_for(lambda: deployment.flwr.nodes() == [])
    node = deployment.flwr.register(deployment.home / "etc" / "keys" / "node-0.pub")
    deployment.start("supernode@.service", "node-0")
    wait_for(lambda: [(one["id"], one["status"]) for one in deployment.flwr.nodes()] == [(node, "online")])
    assert (deployment.home / "state" / "fl-gradcode" / "superlink" / "state.db").exists()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not there")
def test_through_the_proxy_nodes_reach_their_api_and_nobody_reaches_another(deployment: Deployment) -> None:
    wait_for(lambda: deployment.flwr.nodes() is not None)
    port, home = free_port(), deployment.home
    server = deployment.here((DEPLOY / "nginx.conf").read_text()).replace("listen 443", f"listen 127.0.0.1:{port}")
    folders = "".join(
        f"{kind}_temp_path {home / kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (home / "nginx.conf").write_text(
        f"daemon off;\npid {home}/nginx.pid;\nevents {{}}\nhttp {{\naccess_log off;\n{folders}{server}}}\n"
    )
    deployment.processes.start([str(shutil.which("nginx")), "-e", "stderr", "-c", str(home / "nginx.conf")], "nginx")

    def answer(path: str) -> int:
        context = ssl.create_default_context(cafile=str(home / "etc" / "certificates" / "ca.crt"))
        request = urllib.request.Request(f"https://127.0.0.1:{port}{path}", data=b"")
        try:
            with urllib.request.urlopen(request, timeout=10, context=context) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except urllib.error.URLError:
            return 0

    wait_for(lambda: answer("/") == 404)
    # The SuperLink itself answers: it takes nothing but protobuf.
    assert answer("/v1/fleet/pull-messages") == 415
    assert [answer(path) for path in ("/v1/control/list-runs", "/v1/runtime/get-nodes", "/health")] == [404] * 3


APP = '''
from pathlib import Path

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

client = ClientApp()
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Fails the first time; the second finds what the first has left, as with a checkpoint."""
    checkpoint = Path(str(context.run_config["checkpoint"]))
    if not checkpoint.exists():
        checkpoint.touch()
        raise RuntimeError("this machine has lost power")
'''


@pytest.fixture(scope="module")
def fails_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Flower app that fails when it is run for the first time."""
    folder = tmp_path_factory.mktemp("app")
    (folder / "fails_once.py").write_text(APP)
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "fails-once"\nversion = "1.0.0"\nlicense = "Apache-2.0"\ndependencies = []\n'
        '[tool.flwr.app]\npublisher = "fl-gradcode"\n'
        '[tool.flwr.app.components]\nserverapp = "fails_once:server"\nclientapp = "fails_once:client"\n'
        '[tool.flwr.app.config]\ncheckpoint = ""\n'
    )
    return folder


def resume(deployment: Deployment, *arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**deployment.flwr.environment, "PAUSE": "0", "POLL": "1", **settings}
    return script("resume.sh", *arguments, **environment)


@pytest.mark.slow
def test_a_run_that_failed_is_run_again_until_it_is_completed(
    deployment: Deployment, fails_once: Path, tmp_path: Path
) -> None:
    wait_for(lambda: deployment.flwr.nodes() is not None)
    done = resume(deployment, fails_once, "lab", "--run-config", f"checkpoint='{tmp_path / 'state'}'")
    assert done.returncode == 0, done.stdout + done.stderr
    told = [re.sub(r"^\S+ \S+ run \d+ ", "", line) for line in done.stdout.splitlines()]
    assert [line for line in told if line.startswith("is ")] == [
        "is submitted",
        "is finished:failed",
        "is submitted",
        "is completed",
    ]
    assert any("ERROR" in line for line in told)


@pytest.mark.slow
def test_it_gives_up_after_so_many_failed_runs(deployment: Deployment, fails_once: Path) -> None:
    done = resume(deployment, fails_once, "lab", "--run-config", "checkpoint='/no/such/folder/state'", ATTEMPTS="1")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].endswith("given up after 1 failed runs")


@pytest.mark.slow
def test_a_run_that_is_refused_is_not_tried_again(deployment: Deployment, fails_once: Path) -> None:
    done = resume(deployment, fails_once, "lab", "--run-config", "no-such-key=1")
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert "not submitted: " in line and "Invalid run configuration." in line


def test_while_the_superlink_is_away_it_waits(tmp_path: Path) -> None:
    flwr = tmp_path / "flwr"  # away, away, then it takes the run, which is completed
    flwr.write_text(
        f"#!/bin/sh\necho called >>{tmp_path}/calls\n"
        f'case $1:$(wc -l <{tmp_path}/calls) in run:[12]) echo \'"error-message": "SuperLink is unavailable."\' ;;\n'
        'run:*) echo \'"run-id": "7",\' ;; ls:*) echo \'"status": "finished:completed",\' ;; esac\n'
    )
    flwr.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = script("resume.sh", ".", "lab", PATH=path, PAUSE="0", POLL="0", ATTEMPTS="1")
    assert done.returncode == 0
    assert [line.split(" ", 2)[2] for line in done.stdout.splitlines()] == [
        "not submitted: SuperLink is unavailable.",
        "not submitted: SuperLink is unavailable.",
        "run 7 is submitted",
        "run 7 is completed",
    ]


def test_without_flwr_it_says_so_at_once() -> None:
    done = script("resume.sh", ".", "lab", PATH="/usr/bin:/bin")
    assert done.returncode == 2 and "there is no flwr in PATH: export PATH=/opt/fl-gradcode/bin:$PATH" in done.stderr
