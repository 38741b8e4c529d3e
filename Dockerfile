# docker build -t hrldm .
# docker run --rm -u "$(id -u):$(id -g)" -v "$PWD:/data" hrldm insert CT OUT --subtype part-solid --diameter 12
# The image is for the CPU. pip's default index may serve torch with CUDA, about 5 GB more: name PyTorch's CPU index by
# --build-arg PIP_EXTRA_INDEX_URL=...
FROM python:3.11-slim
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY hrldm hrldm
RUN pip install --no-cache-dir --constraint constraints.txt '.[dicom-seg]' && rm -rf /src/*
ENV HOME=/tmp PYTHONUTF8=1
WORKDIR /data
ENTRYPOINT ["hrldm"]
