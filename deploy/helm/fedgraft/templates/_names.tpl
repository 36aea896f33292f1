{{- define "fedgraft.name" -}}
{{- printf "%s-server" .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "fedgraft.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "fedgraft.labels" -}}
{{ include "fedgraft.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}
