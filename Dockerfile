# How to build and run it: docs/serving.md, "In a container".
FROM python:3.13-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ cmake && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/tenfold
ENV PATH=/opt/tenfold/bin:$PATH
WORKDIR /src
# torch by itself: from the index without CUDA, and in the version that the constraints have, or pip would get another one after it.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt ./
RUN pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
COPY . .
# The installation goes on without kernels where they don't compile; the service can't, so the last line tells.
RUN pip install --no-cache-dir -c constraints.txt '.[serve]' && cd / && python -c 'import tenfold.kernels._native'

FROM python:3.13-slim
COPY --from=build /opt/tenfold /opt/tenfold
ENV PATH=/opt/tenfold/bin:$PATH
# Volumes begin with the owner that their folders have here.
RUN useradd --create-home tenfold && install -d -o tenfold -g tenfold -m 700 /keys /cache
USER tenfold
EXPOSE 8000
HEALTHCHECK --start-period=10m CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://localhost:8000/ready', timeout=10)"]
ENTRYPOINT ["tenfold"]
CMD ["serve", "/model", "--host", "0.0.0.0", "--api-keys", "/keys/keys.json", "--prefix-cache-dir", "/cache"]
