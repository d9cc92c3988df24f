"""The API of dstrain: the `DeepSeekTraining` resource, the worker protocol and the names both use.

This package is the contract between the operator, the worker pods, the client and the CRD. It does
no I/O and imports nothing but pydantic, so that every other room may depend on it.
"""
