#!/usr/bin/env bash
# T5 11B: 24 + 24 layers, hidden 1024, MLP 65536, 128 heads of 128.
#
# source      arXiv 1910.10683, section 3.7
# parameters  11.31 billion; published: about 11 billion
# layout      256 GPUs: tensor 8, data 32
# hardware    published on TPUs
# ours        layout; Adam, its rates, initial values; bf16, distributed optimizer, sequence
#             parallelism
#
#     DATA=text_text_sentence TOKENIZER_MODEL=spiece.model bash examples/t5/11b.sh
#     DRY_RUN=1 bash examples/t5/11b.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_t5.py GPUS=256 VOCAB_SIZE=32128 launch "${T5_RECIPE[@]}" \
    --num-layers 24 --decoder-num-layers 24 --hidden-size 1024 --ffn-hidden-size 65536 \
    --num-attention-heads 128 --kv-channels 128 --logit-scale 0.03125 \
    --tensor-model-parallel-size 8 --sequence-parallel \
    --micro-batch-size 8 \
    "$@"
