# docker build -t isouq . && docker run --rm -v "$PWD/build:/isouq/build" isouq
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
# The small build of torch, without CUDA.
ENV TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /isouq
COPY . .
RUN make .venv/isouq-installed PYTHON=python3
CMD ["make", "book", "PROFILE=smoke"]
