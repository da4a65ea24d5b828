"""The games as environments: PettingZoo, Gymnasium, its vector form, SB3, TorchRL, BenchMARL.

File names say game and interface: ``token_prune_gym``, ``layer_pettingzoo``; ``gym_base`` and
``vector_base`` hold what the environments of an interface share, ``play`` what all share.
"""
