# A container that serves an index. The photos must have the paths under which they were indexed;
# without them, the page shows thumbnails only.
#
#   docker build -t xlir .
#   docker run -p 8000:8000 -e XLIR_TOKEN=SECRET \
#       -v $PWD/photos.index:/photos.index:ro -v /photos:/photos:ro xlir
#
# Other commands are given after the name: docker run ... xlir search --index=/photos.index "deniz"
FROM python:3.13-slim

WORKDIR /xlir
COPY . .
RUN pip install --no-cache-dir '.[search,serve,milvus]'
USER nobody
ENV XLIR_CACHE=/tmp/xlir
EXPOSE 8000
ENTRYPOINT ["python", "-m", "xlir.main"]
CMD ["serve", "--index=/photos.index", "--host=0.0.0.0"]
