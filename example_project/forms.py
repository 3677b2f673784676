"""What visitors may ask for, with limits that keep one visitor from holding a core for long."""

from __future__ import annotations

from zoneinfo import ZoneInfo, available_timezones

from django import forms

MAX_UPLOAD_BYTES = 20 * 1024 * 1024


class LimitForm(forms.Form):
    """How far to count primes."""

    limit = forms.IntegerField(
        label="Count primes below",
        min_value=0,
        max_value=3_000_000,
        widget=forms.NumberInput(attrs={"step": 1}),
    )


class LimitsForm(forms.Form):
    """How far to count primes, several times."""

    limits = forms.CharField(
        label="Count primes below each of",
        help_text="Up to 8 whole numbers, at most 3,000,000 each, separated by spaces.",
    )

    def clean_limits(self) -> list[int]:
        """The limits as numbers."""
        words = self.cleaned_data["limits"].replace(",", " ").split()
        field = LimitForm.base_fields["limit"]
        if not 1 <= len(words) <= 8:
            raise forms.ValidationError("Give one to eight numbers.")
        return [field.clean(word) for word in words]


class UploadForm(forms.Form):
    """A file to hash and compress."""

    file = forms.FileField(label="File", allow_empty_file=True, help_text="At most 20 MB.")

    def clean_file(self) -> object:
        """The upload, if it is small enough."""
        upload = self.cleaned_data["file"]
        if upload.size > MAX_UPLOAD_BYTES:
            raise forms.ValidationError("The file is larger than 20 MB.")
        return upload


class ZoneForm(forms.Form):
    """The time zone that a call should run in."""

    zone = forms.CharField(label="Time zone", initial="Asia/Tokyo", help_text="Such as Asia/Tokyo.")

    def clean_zone(self) -> ZoneInfo:
        """The zone, if the machine knows it."""
        name = self.cleaned_data["zone"]
        if name not in available_timezones():
            raise forms.ValidationError("No time zone has this name.")
        return ZoneInfo(name)
