"""Names that more than one room must spell alike: group, labels, environment, ports, paths."""

from typing import Final

GROUP: Final = "dstrain.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
KIND: Final = "DeepSeekTraining"
PLURAL: Final = "deepseektrainings"
SINGULAR: Final = "deepseektraining"
SHORT_NAMES: Final = ("dst",)
CATEGORIES: Final = ("training",)

MANAGER: Final = "dstrain-operator"
LABEL_TRAINING: Final = f"{GROUP}/training"
LABEL_SLOT: Final = f"{GROUP}/slot"
LABEL_ATTEMPT: Final = f"{GROUP}/attempt"
ANNOTATION_EXCLUDED_NODES: Final = f"{GROUP}/excluded-nodes"  # of a pod, comma-separated
TAINT_SUSPECT: Final = f"{GROUP}/suspect"  # of a node that failures point at, if asked for

# Environment of every worker pod, set by the operator.
ENV_COORDINATOR: Final = "DSTRAIN_COORDINATOR"  # http(s)://host:port
ENV_TOKEN: Final = "DSTRAIN_TOKEN"  # noqa: S105 - bearer token of this training
ENV_CA_FILE: Final = (
    "DSTRAIN_CA_FILE"  # PEM file of the coordinator's CA; the system's store if unset
)
ENV_TRAINING: Final = "DSTRAIN_TRAINING"  # name of the resource
ENV_TRAINING_UID: Final = "DSTRAIN_TRAINING_UID"
ENV_NAMESPACE: Final = "DSTRAIN_NAMESPACE"
ENV_POD: Final = "DSTRAIN_POD"
ENV_POD_UID: Final = "DSTRAIN_POD_UID"
ENV_POD_IP: Final = "DSTRAIN_POD_IP"
ENV_NODE: Final = "DSTRAIN_NODE"
ENV_SLOT: Final = "DSTRAIN_SLOT"
ENV_CONFIG: Final = "DSTRAIN_CONFIG"  # JSON of dstrain_api.config.TrainerConfig
ENV_CHECKPOINT_DIR: Final = "DSTRAIN_CHECKPOINT_DIR"  # folder shared by all workers
# Set instead of it where checkpoints are in a bucket; the agent then makes a folder for this pod's
# workers, which goes with the pod.
ENV_CHECKPOINT_URI: Final = "DSTRAIN_CHECKPOINT_URI"
ENV_BEAT_INTERVAL: Final = "DSTRAIN_BEAT_INTERVAL_S"
ENV_HANG_TIMEOUT: Final = "DSTRAIN_HANG_TIMEOUT_S"  # absent: learned from the steps
ENV_METRICS_PORT: Final = "DSTRAIN_METRICS_PORT"  # 0: any free port (local runs)

# Environment of every worker process, set by the agent (torchrun) for one generation.
ENV_GENERATION: Final = "DSTRAIN_GENERATION"
ENV_REPORT_SOCKET: Final = "DSTRAIN_REPORT_SOCKET"  # unix datagram socket of the pod's agent
ENV_FAILURE_INTERVAL: Final = "DSTRAIN_FAILURE_INTERVAL_S"  # Assignment.failure_interval_s
ENV_PREFLIGHT: Final = "DSTRAIN_PREFLIGHT"  # Assignment.preflight, as 0 or 1
ENV_LOCAL_DIR: Final = "DSTRAIN_LOCAL_DIR"  # folder of this pod that outlives worker processes

METRICS_PORT: Final = 9400
COORDINATOR_PORT: Final = 8080
TRAINER_CONTAINER: Final = "trainer"
RENDEZVOUS_BACKEND: Final = "dstrain"
VOLUME_ROOT: Final = (
    "/mnt/dstrain"  # pvc://claim/path is seen by the trainer at VOLUME_ROOT/claim/path
)

# A worker process that saved because a peer was told to stop exits with this code (EX_TEMPFAIL):
# start it again.
EXIT_RESTART: Final = 75
