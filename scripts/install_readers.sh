#!/bin/sh
# Packages of the oldest supported reader of hf/ (transformers 4.57) in a folder of their own, used through PYTHONPATH.
# Without a network the tests that need it skip.   usage: install_readers.sh PYTHON FOLDER
set -u
python=$1 folder=$2
test -d "$folder/transformers" && exit 0
rm -rf "$folder.part"
if PIP_DISABLE_PIP_VERSION_CHECK=1 "$python" -m pip install --quiet --target "$folder.part" --no-deps \
    "transformers==4.57.6" "tokenizers==0.22.2" "huggingface_hub==0.36.2"; then
    rm -rf "$folder"
    mv "$folder.part" "$folder"
else
    rm -rf "$folder.part"
    echo "transformers 4.57 cannot be installed; tests of older readers are skipped" >&2
fi
