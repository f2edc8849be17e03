"""Generation: does Bayesian decoding know when it is wrong?"""
