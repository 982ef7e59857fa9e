FROM python:3.13-slim
COPY cloudserver.py /app/cloudserver.py
WORKDIR /app
RUN python3 -m compileall -q /app && useradd --system --uid 1000 --home-dir /data cloud && mkdir /data && chown cloud /data && chmod 700 /data
USER cloud
ENV CLOUDSERVER_DATA=/data CLOUDSERVER_HOST=0.0.0.0 PYTHONUNBUFFERED=1
VOLUME /data
EXPOSE 8765
HEALTHCHECK --interval=30s --timeout=5s --start-period=5s CMD ["python3", "-c", \
  "import urllib.request; urllib.request.urlopen('http://localhost:8765/healthz', timeout=4)"]
ENTRYPOINT ["python3", "-m", "cloudserver"]
CMD ["serve"]
