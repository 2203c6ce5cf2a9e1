# An image that serves paretune: docker build -t paretune . && docker run -p 127.0.0.1:8765:8765 -e PARETUNE_TOKEN -v paretune:/home/paretune/mlruns paretune
FROM python:3.11-slim AS build
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir "build==1.6.1" && python -m build --wheel --outdir /wheels

FROM python:3.11-slim
ENV OMP_WAIT_POLICY=PASSIVE MLFLOW_DISABLE_TELEMETRY=true PYTHONUNBUFFERED=1
COPY --from=build /wheels /wheels
COPY constraints.txt /wheels/constraints.txt
# torch for the CPU: the usual index would bring several gigabytes of CUDA.
RUN pip install --no-cache-dir -c /wheels/constraints.txt --index-url https://download.pytorch.org/whl/cpu torch==2.13.0 \
    && pip install --no-cache-dir -c /wheels/constraints.txt /wheels/*.whl \
    && rm -r /wheels \
    && useradd --create-home --uid 1000 paretune
USER 1000
WORKDIR /home/paretune
RUN mkdir mlruns
VOLUME /home/paretune/mlruns
EXPOSE 8765
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s \
    CMD ["python", "-m", "paretune.service.server.health"]
# Outside the container only where the port is published; without PARETUNE_TOKEN it refuses to start. Publish any port: the names are
# allowed with each. With names of your own (a proxy) keep `--allow-host localhost`, by which the health check asks.
ENTRYPOINT ["paretune"]
CMD ["serve", "--host", "0.0.0.0", "--allow-host", "localhost", "--allow-host", "127.0.0.1"]
