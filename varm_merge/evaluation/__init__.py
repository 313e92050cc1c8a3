"""Evaluates a chat model on MT-Bench and AlpacaEval 2, with the files that FastChat and alpaca_eval read.

``local`` and ``endpoint`` query models. ``answers`` writes files of answers, ``mt_bench`` and ``alpaca_eval`` have
them judged, ``results`` makes the tables. ``collect`` sends requests in parallel, ``journal`` keeps what is
finished when a run is killed, ``questions`` reads and checks files.
"""
