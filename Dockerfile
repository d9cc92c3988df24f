# Two images from one file:
#   docker build --target operator -t dstrain-operator .
#   docker build --target trainer  -t dstrain-trainer  .
# BASE_IMAGE is any Debian with python3 >= 3.11 and its venv module. TORCH_INDEX_URL is an extra package index for torch,
# for a CPU-only or another CUDA build; empty takes the CUDA build of the default index.
ARG BASE_IMAGE=python:3.13-slim

# The requirements of each image, taken from pyproject.toml: the heavy layers below are rebuilt when these lists change,
# and not when anything else in that file does.
FROM ${BASE_IMAGE} AS requirements
COPY pyproject.toml /src/
RUN python3 -c "import tomllib, pathlib; \
project = tomllib.loads(pathlib.Path('/src/pyproject.toml').read_text())['project']; \
[pathlib.Path(f'/{extra}.txt').write_text('\n'.join(project['dependencies'] + project['optional-dependencies'][extra])) \
 for extra in ('operator', 'trainer')]"

# Our own code, installed into an empty root: the last and smallest layer of both images.
FROM ${BASE_IMAGE} AS code
COPY constraints /src/constraints
RUN python3 -m venv /opt/dstrain && /opt/dstrain/bin/pip install --no-cache-dir -q -c /src/constraints/dev.txt hatchling
COPY pyproject.toml README.md LICENSE /src/
COPY crds /src/crds
COPY operator /src/operator
COPY trainer_image /src/trainer_image
COPY sdk /src/sdk
RUN /opt/dstrain/bin/pip install -q --no-deps --no-build-isolation --no-cache-dir --root /out /src

FROM ${BASE_IMAGE} AS operator-packages
COPY --from=requirements /operator.txt /src/
COPY constraints/operator.txt /src/constraints.txt
RUN python3 -m venv /opt/dstrain \
 && /opt/dstrain/bin/pip install --no-cache-dir -q -c /src/constraints.txt -r /src/operator.txt \
 && /opt/dstrain/bin/pip uninstall -q -y pip

FROM ${BASE_IMAGE} AS operator
RUN echo 'dstrain:x:10001:10001::/tmp:/usr/sbin/nologin' >> /etc/passwd
COPY --from=operator-packages /opt/dstrain /opt/dstrain
COPY --from=code /out/opt/dstrain /opt/dstrain
ENV PATH=/opt/dstrain/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
ENTRYPOINT ["dstrain-operator"]

FROM ${BASE_IMAGE} AS trainer
ARG TORCH_INDEX_URL=""
RUN echo 'dstrain:x:10001:10001::/tmp:/usr/sbin/nologin' >> /etc/passwd
COPY --from=requirements /trainer.txt /src/
COPY constraints/trainer.txt /src/constraints.txt
RUN python3 -m venv /opt/dstrain \
 && /opt/dstrain/bin/pip install --no-cache-dir -q -c /src/constraints.txt -r /src/trainer.txt \
      ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} \
 && /opt/dstrain/bin/pip uninstall -q -y pip
COPY --from=code /out/opt/dstrain /opt/dstrain
ENV PATH=/opt/dstrain/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1
USER 10001:10001
# torchrun is the container's first process: a worker pod ends with it and leaves no orphans.
ENTRYPOINT ["torchrun"]
