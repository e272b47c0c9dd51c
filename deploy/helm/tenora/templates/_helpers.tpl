{{- define "tenora.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "tenora.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "tenora.labels" -}}
{{ include "tenora.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "tenora.image" -}}
{{- $tag := default (printf "%s-%s" .Chart.AppVersion .Values.image.variant) .Values.image.tag -}}
{{- printf "%s:%s" .Values.image.repository $tag -}}
{{- end -}}

{{- define "tenora.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "tenora.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* The Secret that holds the admin key, or nothing where the service makes its own. */}}
{{- define "tenora.keySecretName" -}}
{{- if .Values.apiKey.existingSecret -}}
{{- .Values.apiKey.existingSecret -}}
{{- else if .Values.apiKey.value -}}
{{- printf "%s-key" (include "tenora.fullname" .) -}}
{{- end -}}
{{- end -}}

{{- define "tenora.claimName" -}}
{{- default (printf "%s-home" (include "tenora.fullname" .)) .Values.persistence.existingClaim -}}
{{- end -}}

{{/* A setting as text. Helm reads numbers as floats, and would write 8589934592 as 8.589934592e+09. */}}
{{- define "tenora.text" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}
{{- printf "%.0f" . -}}
{{- else -}}
{{- toString . -}}
{{- end -}}
{{- end -}}

{{/* Rules between values, which a JSON schema cannot state. */}}
{{- define "tenora.check" -}}
{{- $grace := .Values.terminationGracePeriodSeconds -}}
{{- /* 20: cutting off what outlasted the drain (5 + 5) and saving the state of running jobs (10). */}}
{{- $least := addf .Values.preStopSeconds .Values.drainSeconds 20 -}}
{{- if lt (float64 $grace) (float64 $least) -}}
{{- fail (printf "terminationGracePeriodSeconds (%v) must be at least preStopSeconds + drainSeconds + 20 (%v): the kubelet would kill the pod while requests finish" $grace $least) -}}
{{- end -}}
{{- if and .Values.apiKey.existingSecret .Values.apiKey.value -}}
{{- fail "set apiKey.existingSecret or apiKey.value, not both" -}}
{{- end -}}
{{- if and .Values.database.existingSecret (hasKey .Values.settings "database_url") -}}
{{- fail "set database.existingSecret or settings.database_url, not both" -}}
{{- end -}}
{{- if and .Values.persistence.existingClaim (not .Values.persistence.enabled) -}}
{{- fail "persistence.existingClaim needs persistence.enabled=true" -}}
{{- end -}}
{{- end -}}
