"""The operator's configuration: environment variables, read once at the start.

Required:
    DSTRAIN_TRAINER_IMAGE         image of worker pods whose training names none
    DSTRAIN_COORDINATOR_URL       where worker pods reach this operator, http(s)://host:port
    DSTRAIN_TOKEN_KEY             secret that the tokens of trainings are made of, 32 characters

With a default:
    DSTRAIN_TRAINER_PULL_POLICY   Always, IfNotPresent (default) or Never
    DSTRAIN_TRAINER_PULL_SECRETS  names of pull secrets, by comma; none
    DSTRAIN_BEAT_INTERVAL_S       seconds between the beats of a worker pod; 1
    DSTRAIN_TAINT_NODES           whether nodes that failures point at are tainted; false
    DSTRAIN_WATCH_NAMESPACES      namespaces, by comma; all
    DSTRAIN_COORDINATOR_HOST      address to listen on; all
    DSTRAIN_COORDINATOR_PORT      port to listen on; 8080
    DSTRAIN_TLS_CERT_FILE         certificate chain of the server (PEM); no TLS
    DSTRAIN_TLS_KEY_FILE          its key; both or none
    DSTRAIN_LEASE                 name of the Service whose traffic goes to one of several replicas,
                                  and of the Lease that this one holds; none: this is the only one
    DSTRAIN_POD_NAME              with it: this replica's pod,
    DSTRAIN_POD_NAMESPACE         the namespace of all of these,
    DSTRAIN_POD_IP                and the address of the pod
    KUBECONFIG                    cluster to use from outside; the one this pod runs in
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dstrain_api.constants import COORDINATOR_PORT, ENV_BEAT_INTERVAL

from deepseek_operator.core.model import Settings
from deepseek_operator.runtime.election import Replica

SHORTEST_KEY: Final = 32  # characters; a token can be tried against the server, a key offline
PULL_POLICIES: Final = ("Always", "IfNotPresent", "Never")


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What the environment says."""

    settings: Settings
    token_key: bytes
    namespaces: tuple[str, ...]  # empty: all
    host: str
    port: int
    tls_cert: Path | None
    tls_key: Path | None
    replica: Replica | None  # None: there are no others


def from_environment(environment: Mapping[str, str]) -> Configuration:
    """The configuration, checked.

    Raises:
        ValueError: a variable is missing or wrong; the message says which and what to set.
    """
    return Configuration(
        settings=Settings(
            trainer_image=_required(environment, "DSTRAIN_TRAINER_IMAGE", "the trainer image"),
            coordinator_url=_url(environment),
            coordinator_ca=_ca(environment),
            beat_interval_s=_seconds(environment),
            image_pull_policy=_pull_policy(environment),
            image_pull_secrets=_names(environment, "DSTRAIN_TRAINER_PULL_SECRETS"),
            taint_nodes=_switch(environment, "DSTRAIN_TAINT_NODES"),
        ),
        token_key=_token_key(environment),
        namespaces=_names(environment, "DSTRAIN_WATCH_NAMESPACES"),
        host=environment.get("DSTRAIN_COORDINATOR_HOST", ""),
        port=_port(environment),
        replica=_replica(environment),
        **_tls(environment),
    )


def _required(environment: Mapping[str, str], name: str, what: str) -> str:
    value = environment.get(name, "")
    if not value:
        raise ValueError(f"{name} is not set: set it to {what}")
    return value


def _url(environment: Mapping[str, str]) -> str:
    url = _required(environment, "DSTRAIN_COORDINATOR_URL", "the address of this operator")
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"DSTRAIN_COORDINATOR_URL is {url!r}: begin it with http:// or https://")
    return url.rstrip("/")


def _ca(environment: Mapping[str, str]) -> str:
    path = _file(environment, "DSTRAIN_TLS_CA_FILE")
    return path.read_text() if path else ""


def _token_key(environment: Mapping[str, str]) -> bytes:
    key = _required(environment, "DSTRAIN_TOKEN_KEY", f"{SHORTEST_KEY} random characters or more")
    if len(key) < SHORTEST_KEY:
        raise ValueError(
            f"DSTRAIN_TOKEN_KEY has {len(key)} characters: give it {SHORTEST_KEY} or more"
        )
    return key.encode()


def _seconds(environment: Mapping[str, str]) -> float:
    text = environment.get(ENV_BEAT_INTERVAL) or "1"
    try:
        interval_s = float(text)
    except ValueError:
        interval_s = 0.0
    if not 0.1 <= interval_s <= 60:
        raise ValueError(f"{ENV_BEAT_INTERVAL} is {text!r}: set it to 0.1 to 60 seconds")
    return interval_s


def _switch(environment: Mapping[str, str], name: str) -> bool:
    text = environment.get(name) or "false"
    if text not in ("true", "false"):
        raise ValueError(f"{name} is {text!r}: set it to true or false")
    return text == "true"


def _pull_policy(environment: Mapping[str, str]) -> str:
    policy = environment.get("DSTRAIN_TRAINER_PULL_POLICY") or "IfNotPresent"
    if policy not in PULL_POLICIES:
        allowed = ", ".join(PULL_POLICIES)
        raise ValueError(f"DSTRAIN_TRAINER_PULL_POLICY is {policy!r}: set one of {allowed}")
    return policy


def _names(environment: Mapping[str, str], name: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in environment.get(name, "").split(",") if part.strip())


def _port(environment: Mapping[str, str]) -> int:
    text = environment.get("DSTRAIN_COORDINATOR_PORT") or str(COORDINATOR_PORT)
    if not text.isdigit() or int(text) > 65_535:
        raise ValueError(f"DSTRAIN_COORDINATOR_PORT is {text!r}: set it to a port, 0 to 65535")
    return int(text)


def _replica(environment: Mapping[str, str]) -> Replica | None:
    if not (service := environment.get("DSTRAIN_LEASE", "")):
        return None
    return Replica(
        service=service,
        namespace=_required(environment, "DSTRAIN_POD_NAMESPACE", "the namespace of this pod"),
        pod=_required(environment, "DSTRAIN_POD_NAME", "the name of this pod"),
        address=_required(environment, "DSTRAIN_POD_IP", "the address of this pod"),
    )


def _tls(environment: Mapping[str, str]) -> dict[str, Path | None]:
    paths = {
        "tls_cert": _file(environment, "DSTRAIN_TLS_CERT_FILE"),
        "tls_key": _file(environment, "DSTRAIN_TLS_KEY_FILE"),
    }
    if (paths["tls_cert"] is None) != (paths["tls_key"] is None):
        raise ValueError("set both DSTRAIN_TLS_CERT_FILE and DSTRAIN_TLS_KEY_FILE, or neither")
    return paths


def _file(environment: Mapping[str, str], name: str) -> Path | None:
    text = environment.get(name, "")
    if text and not Path(text).is_file():
        raise ValueError(f"{name} is {text!r}, which is no file")
    return Path(text) if text else None
