#!/usr/bin/env bash
# BERT 1.3B: 24 layers, hidden 2048, 32 heads.
#
# source      arXiv 1909.08053, table 4
# parameters  1.281 billion; published: 1.3 billion, rounded
# layout      128 GPUs: tensor 2, data 64
# hardware    published on V100 of 32 GB
# ours        layout; bf16, distributed optimizer, sequence parallelism
#
#     DATA=text_text_sentence VOCAB=vocab.txt bash examples/bert/1.3b.sh
#     DRY_RUN=1 bash examples/bert/1.3b.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_bert.py GPUS=128 VOCAB_SIZE=30522 launch "${BERT_RECIPE[@]}" \
    --num-layers 24 --hidden-size 2048 --num-attention-heads 32 \
    --tensor-model-parallel-size 2 --sequence-parallel \
    --micro-batch-size 16 \
    "$@"
