# A container that serves an index. Mount the photos at the paths at which they were indexed. If
# they are not mounted, the page shows only their thumbnails.
#
#   docker build -t xlir .
#   docker run -p 8000:8000 -e XLIR_TOKEN=SECRET \
#       -v $PWD/photos.index:/photos.index:ro -v /photos:/photos:ro xlir
#
# To run another command, write it after the image's name:
#   docker run ... xlir search --index=/photos.index "deniz"
FROM python:3.13-slim

WORKDIR /xlir
COPY . .
RUN pip install --no-cache-dir '.[search,serve,milvus]'
USER nobody
ENV XLIR_CACHE=/tmp/xlir
EXPOSE 8000
ENTRYPOINT ["python", "-m", "xlir.main"]
CMD ["serve", "--index=/photos.index", "--host=0.0.0.0"]
