# The step images for users of buildx, as images/build.sh builds them; `make image-wheels` comes first.
#
#   make image-wheels
#   VERSION=0.1.0 TAG=0.1.0 REVISION=$(git rev-parse HEAD) docker buildx bake -f images/docker-bake.hcl
#
# CUDA: make image-wheels VARIANT=cuda, and VARIANT=cuda for bake.

variable "BASE_IMAGE" { default = "python:3.11-slim-bookworm" }
variable "VARIANT" { default = "cpu" }
variable "REPOSITORY" { default = "spectraqlora" }
variable "VERSION" { default = "" }
variable "REVISION" { default = "" }
variable "TAG" { default = "latest" }

group "default" {
  targets = ["light", "mlflow", "step"]
}

target "offline" {
  context = "."
  network = "none"
}

target "base" {
  inherits   = ["offline"]
  dockerfile = "images/base/Dockerfile"
  target     = "base"
  args       = { BASE_IMAGE = BASE_IMAGE }
}

target "torch" {
  inherits = ["base"]
  target   = "torch"
  args     = { VARIANT = VARIANT }
}

target "light" {
  inherits   = ["offline"]
  dockerfile = "images/light/Dockerfile"
  contexts   = { below = "target:base" }
  args       = { BASE = "below", VERSION = VERSION, REVISION = REVISION }
  tags       = ["${REPOSITORY}/light:${TAG}"]
}

target "mlflow" {
  inherits   = ["offline"]
  dockerfile = "images/mlflow/Dockerfile"
  contexts   = { below = "target:base" }
  args       = { BASE = "below", VERSION = VERSION, REVISION = REVISION }
  tags       = ["${REPOSITORY}/mlflow:${TAG}"]
}

target "step" {
  name       = step
  matrix     = { step = ["merge-export", "quantize-load", "re-evaluate", "select-layers", "snr-analyze", "train"] }
  inherits   = ["offline"]
  dockerfile = "images/step/Dockerfile"
  contexts   = { below = "target:torch" }
  args       = { BASE = "below", STEP = step, VERSION = VERSION, REVISION = REVISION }
  tags       = ["${REPOSITORY}/${step}:${TAG}"]
}
