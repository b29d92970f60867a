#!/usr/bin/env bash
# T5 3B: 24 + 24 layers, hidden 1024, MLP 16384, 32 heads of 128.
#
# source      arXiv 1910.10683, section 3.7
# parameters  2.852 billion; published: around 2.8 billion
# layout      128 GPUs: tensor 2, data 64
# hardware    published on TPUs
# ours        layout; Adam, its rates, initial values; bf16, distributed optimizer, sequence
#             parallelism
#
#     DATA=text_text_sentence TOKENIZER_MODEL=spiece.model bash examples/t5/3b.sh
#     DRY_RUN=1 bash examples/t5/3b.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_t5.py GPUS=128 VOCAB_SIZE=32128 launch "${T5_RECIPE[@]}" \
    --num-layers 24 --decoder-num-layers 24 --hidden-size 1024 --ffn-hidden-size 16384 \
    --num-attention-heads 32 --kv-channels 128 --logit-scale 0.03125 \
    --tensor-model-parallel-size 2 --sequence-parallel \
    --micro-batch-size 16 \
    "$@"
