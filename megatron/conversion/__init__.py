"""A checkpoint of one system becomes that of another, with a measured certificate.

Read in this order: ``stored_model`` (what passes between readers and writers), ``native``,
``megatron_lm`` and ``hugging_face`` (one reader and one writer each), ``network`` and ``stock``
(what the two sides compute), ``certificate`` (how far that differs).
"""
