"""The needle model: a Llama of a few million parameters that can do one thing, look up what stands in a long text.

What it is: a model that fits into the repository and whose dense attention solves retrieval tasks at 32K and 64K
tokens, so that every sparse method can be judged at those lengths on the CPU, in seconds, against a dense score near
100 %. What it is not: a language model. It has read nothing but the generators' own tasks; its heads are pure
induction, one key per query stands far above the rest, and that flatters every method that looks for a few large
scores. A method that fails here is broken; a method that passes here is not thereby good.

`tokenizer` builds its vocabulary, `weights` what training starts from, `texts` and `stream` make its training data,
`ladder` sets their length, `train` trains it and `check` measures it with the real tasks. Recipe, seed and results of
the shipped weights: `assets/needle/README.md`.
"""
