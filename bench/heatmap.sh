#!/bin/sh
# The pass-key heat map, depth x length, of the model that ships here: dense, 1/16 and 2,048 tokens,
# 80 trials each (5 lengths x 8 depths x 2 documents; one prefill serves the 8 keys of a document).
#
#   bench/heatmap.sh OUT [more options of `ds-offload eval passkey`, such as --text FILE or --decode-question]
#
# Writes OUT/passkey.jsonl, passkey.json and passkey-tiny-256k.png; a stopped run goes on where it was.
set -eu
[ $# -ge 1 ] || { echo "usage: bench/heatmap.sh OUT [options of ds-offload eval passkey]" >&2; exit 2; }
out=$1
shift
exec "${PYTHON:-python}" -m offload_runtime eval passkey \
    --ctx 16384,32768,65536,131072,262144 --documents 2 --budget 1/16,2048 --out "$out" "$@"
