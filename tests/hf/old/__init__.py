"""transformers 4.34.0 as the oracle of megatron/hf.

`cases` draws what is asked, `oracle` answers it with transformers 4.34.0 in an environment of its
own (`environment`), `compare` answers it with megatron/hf and holds the two against each other.
`make_fixture` writes some answers once for the tests; `full` draws any number of new ones.
"""
