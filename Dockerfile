FROM python:3.13-slim
COPY cloudserver.py /app/cloudserver.py
WORKDIR /app
RUN python3 -m compileall -q /app && useradd --system --uid 1000 --home-dir /data cloud && mkdir /data && chown cloud /data && chmod 700 /data
ENV CLOUDSERVER_DATA=/data CLOUDSERVER_HOST=0.0.0.0 PYTHONUNBUFFERED=1
VOLUME /data
EXPOSE 8765
# No USER: started as root it becomes the owner of /data, whoever that is; any --user works, too.
HEALTHCHECK --interval=60s --timeout=5s --start-period=10s CMD ["python3", "-m", "cloudserver", "doctor", "--alive"]
ENTRYPOINT ["python3", "-m", "cloudserver"]
CMD ["serve"]
