#!/usr/bin/env bash
# T5 220M: 12 + 12 layers, hidden 768, MLP 3072, 12 heads of 64.
#
# source      arXiv 1910.10683, section 3.1.1
# parameters  222.9 million; published: about 220 million
# layout      64 GPUs: data 64
# hardware    published on TPUs
# ours        layout; Adam, its rates, initial values; bf16, distributed optimizer
#
#     DATA=text_text_sentence TOKENIZER_MODEL=spiece.model bash examples/t5/220m.sh
#     DRY_RUN=1 bash examples/t5/220m.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_t5.py GPUS=64 VOCAB_SIZE=32128 launch "${T5_RECIPE[@]}" \
    --num-layers 12 --decoder-num-layers 12 --hidden-size 768 --ffn-hidden-size 3072 \
    --num-attention-heads 12 --kv-channels 64 --logit-scale 0.036084391824351615 \
    --micro-batch-size 32 \
    "$@"
