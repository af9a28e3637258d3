"""Put new files in place of old ones, atomically and durably.

System calls, the transaction, staging, and manifests of digests.
May import: `support`. Imports without torch.
"""
