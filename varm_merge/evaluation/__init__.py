"""MT-Bench and AlpacaEval 2: answers in the files that their judges read, judgments in those that they write.

``questions`` reads what others have written, ``local`` and ``endpoint`` answer, ``answers`` makes the files of
answers, ``mt_bench`` and ``alpaca_eval`` those of judgments, ``results`` the tables. ``journal`` keeps what a
killed run has made.
"""
