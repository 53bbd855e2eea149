"""The 4-bit base, once; policy and reference on it; log-probs under each; is it exact in packs?"""
