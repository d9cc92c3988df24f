"""The operator as a process, and its configuration."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from deepseek_operator.logs import KeyValueFormatter
from deepseek_operator.main import main
from deepseek_operator.runtime.election import Replica
from deepseek_operator.settings import from_environment

COMPLETE = {
    "DSTRAIN_TRAINER_IMAGE": "registry.example/trainer:1",
    "DSTRAIN_COORDINATOR_URL": "http://operator.dstrain:8080/",
    "DSTRAIN_TOKEN_KEY": "k" * 32,
}


def test_defaults() -> None:
    configuration = from_environment(COMPLETE)
    assert configuration.settings.trainer_image == "registry.example/trainer:1"
    assert configuration.settings.coordinator_url == "http://operator.dstrain:8080"
    assert configuration.settings.image_pull_policy == "IfNotPresent"
    assert (configuration.namespaces, configuration.port) == ((), 8080)
    assert configuration.tls_cert is None


def test_everything_set(tmp_path: Path) -> None:
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    cert.touch()
    key.touch()
    configuration = from_environment(
        {
            **COMPLETE,
            "DSTRAIN_WATCH_NAMESPACES": "team-a, team-b",
            "DSTRAIN_COORDINATOR_PORT": "9000",
            "DSTRAIN_TRAINER_PULL_POLICY": "Always",
            "DSTRAIN_TRAINER_PULL_SECRETS": "one,two",
            "DSTRAIN_BEAT_INTERVAL_S": "5",
            "DSTRAIN_TAINT_NODES": "true",
            "DSTRAIN_TLS_CERT_FILE": str(cert),
            "DSTRAIN_TLS_KEY_FILE": str(key),
            "DSTRAIN_TLS_CA_FILE": str(cert),
        }
    )
    assert configuration.namespaces == ("team-a", "team-b")
    assert configuration.port == 9000
    assert configuration.settings.image_pull_secrets == ("one", "two")
    assert configuration.settings.beat_interval_s == 5
    assert configuration.settings.taint_nodes
    assert (configuration.tls_cert, configuration.tls_key) == (cert, key)
    assert configuration.settings.coordinator_ca == cert.read_text()


def test_one_of_several_replicas_knows_its_pod() -> None:
    pod = {"DSTRAIN_POD_NAME": "op-1", "DSTRAIN_POD_NAMESPACE": "ns", "DSTRAIN_POD_IP": "10.0.0.1"}
    replica = from_environment({**COMPLETE, "DSTRAIN_LEASE": "op", **pod}).replica
    assert replica == Replica(namespace="ns", pod="op-1", address="10.0.0.1", service="op")
    assert from_environment({**COMPLETE, **pod}).replica is None, "out of a cluster it is alone"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"DSTRAIN_LEASE": "op"}, "DSTRAIN_POD_NAMESPACE is not set"),
        ({"DSTRAIN_TRAINER_IMAGE": ""}, "DSTRAIN_TRAINER_IMAGE is not set"),
        ({"DSTRAIN_COORDINATOR_URL": "operator:8080"}, "begin it with http"),
        ({"DSTRAIN_TOKEN_KEY": "short"}, "give it 32 or more"),
        ({"DSTRAIN_TRAINER_PULL_POLICY": "Sometimes"}, "set one of Always"),
        ({"DSTRAIN_COORDINATOR_PORT": "http"}, "set it to a port"),
        ({"DSTRAIN_BEAT_INTERVAL_S": "often"}, "0.1 to 60 seconds"),
        ({"DSTRAIN_TAINT_NODES": "1"}, "set it to true or false"),
        ({"DSTRAIN_TLS_CERT_FILE": "/nowhere"}, "which is no file"),
        ({"DSTRAIN_TLS_KEY_FILE": __file__}, "set both"),
    ],
)
def test_wrong_variable_says_which_and_what_to_set(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_environment({**COMPLETE, **change})


def test_key_itself_is_not_in_the_message() -> None:
    with pytest.raises(ValueError, match="TOKEN_KEY") as raised:
        from_environment({**COMPLETE, "DSTRAIN_TOKEN_KEY": "secret"})
    assert "secret" not in str(raised.value)


def test_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out.strip()


def test_process_without_configuration_ends_at_once_and_says_what_to_set() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DSTRAIN_")}
    ended = subprocess.run(
        [sys.executable, "-m", "deepseek_operator.main"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert "DSTRAIN_TRAINER_IMAGE is not set" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.fixture
def formatted() -> Callable[[logging.LogRecord], str]:
    return KeyValueFormatter().format


def test_log_line_is_one_line_of_pairs(formatted: Callable[[logging.LogRecord], str]) -> None:
    record = logging.LogRecord("a.b", logging.WARNING, "f", 1, 'said "%s"\nand more', ("x",), None)
    line = formatted(record)
    assert "\n" not in line
    assert line.endswith(r'level=warning logger=a.b message="said \"x\"\nand more"')
