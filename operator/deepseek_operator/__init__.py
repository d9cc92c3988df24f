"""The operator: watches DeepSeekTraining resources, decides by a pure plan, acts on a cluster."""
