# One file for both kinds:
#   docker build -t diffrep .                                           # CUDA: PyTorch's ordinary wheels bring it along
#   docker build -t diffrep:cpu --build-arg TORCH_WHEELS=ADDRESS .      # CPU: the address of PyTorch's CPU wheels
#   docker run --rm --gpus all -v "$PWD":/work diffrep match cat.jpg dog.jpg --points 212,130
# With CUDA the host needs NVIDIA's driver and container toolkit, nothing else. Models are fetched into /models.
FROM python:3.12-slim
ARG TORCH_WHEELS=""
ARG EXTRAS="app,video,parquet,synthesis"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HOME=/models
RUN if [ -n "$TORCH_WHEELS" ]; then pip install --index-url "$TORCH_WHEELS" "torch>=2.6" "torchvision>=0.21"; fi
COPY . /src
RUN pip install "/src[$EXTRAS]" && rm -rf /src && diffrep info --system
RUN useradd --create-home person && mkdir -p /models /work && chown person /models /work
USER person
WORKDIR /work
VOLUME /models
ENTRYPOINT ["diffrep"]
CMD ["--help"]
