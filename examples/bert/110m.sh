#!/usr/bin/env bash
# BERT-base: 12 layers, hidden 768, 12 heads, norms behind the blocks.
#
# source      arXiv 1810.04805, section 3 and appendix A.2
# parameters  110.1 million; published: 110 million
# layout      8 GPUs: data 8
# hardware    published on TPUs, 16 chips
# ours        layout; all sequences of full length, where the paper begins with 128 tokens; bf16,
#             distributed optimizer
#
#     DATA=text_text_sentence VOCAB=vocab.txt bash examples/bert/110m.sh
#     DRY_RUN=1 bash examples/bert/110m.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_bert.py GPUS=8 VOCAB_SIZE=30522 launch "${BERT_RECIPE[@]}" \
    --num-layers 12 --hidden-size 768 --num-attention-heads 12 \
    --norm-position post --layernorm-epsilon 1e-12 \
    --micro-batch-size 32 --global-batch-size 256 --train-iters 1000000 \
    "$@"
