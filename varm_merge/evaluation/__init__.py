"""Evaluates a chat model on MT-Bench and AlpacaEval 2, with the files that FastChat and alpaca_eval read.

``local`` and ``endpoint`` query models. ``answers`` writes files of answers, ``mt_bench`` and ``alpaca_eval`` have
them judged (by ``judging``), ``results`` makes the tables. ``questions`` and ``rows`` read and check files;
``journal`` keeps finished records when a run is killed.
"""
