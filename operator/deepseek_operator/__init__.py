"""The operator: watches DeepSeekTraining resources, decides by a pure plan, and acts on a cluster behind a port."""
