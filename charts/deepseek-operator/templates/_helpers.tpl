{{- define "operator.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "operator.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else if contains (include "operator.name" .) .Release.Name }}
{{- .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "operator.name" .) | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "operator.selector" -}}
app.kubernetes.io/name: {{ include "operator.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "operator.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "operator.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: dstrain
{{- end }}

{{- define "operator.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "operator.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "operator.image" -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag | toString) }}
{{- end }}

{{- define "operator.trainerImage" -}}
{{- printf "%s:%s" .Values.trainer.image.repository (default .Chart.AppVersion .Values.trainer.image.tag | toString) }}
{{- end }}

{{- define "operator.trainerPullSecrets" -}}
{{- $names := list }}
{{- range .Values.trainer.imagePullSecrets }}
{{- $names = append $names .name }}
{{- end }}
{{- join "," $names }}
{{- end }}

{{- define "operator.tokenSecret" -}}
{{- default (printf "%s-token-key" (include "operator.fullname" .)) .Values.coordinator.tokenSecret }}
{{- end }}

{{- define "operator.coordinatorUrl" -}}
{{- printf "%s://%s.%s.svc:%d" (ternary "https" "http" (ne .Values.tls.secretName "")) (include "operator.fullname" .) .Release.Namespace (int .Values.coordinator.port) }}
{{- end }}

{{- /* What the operator does to the objects of a training's namespace. */ -}}
{{- define "operator.rules" -}}
- apiGroups: [dstrain.dev]
  resources: [deepseektrainings]
  verbs: [list, watch, delete] # delete: ttlSecondsAfterFinished
- apiGroups: [dstrain.dev]
  resources: [deepseektrainings/status]
  verbs: [update]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch, create, delete]
- apiGroups: [""]
  resources: [services, secrets, persistentvolumeclaims, events]
  verbs: [create]
{{- end }}
